package main

import (
	"bytes"
	"errors"
	"time"
)

var (
	data = []byte("data: ")
	done = []byte("data: [DONE]")
	text = []byte(`"content":"`)
)

// events follows one answer. For a stream it counts the chunks and times them.
type events struct {
	due, last time.Time
	partial   []byte // of a line that the next read completes
	finished  bool
	any       bool
}

func (e *events) begin(due time.Time) {
	e.due, e.last = due, time.Time{}
	e.partial = e.partial[:0]
	e.finished, e.any = false, false
}

func (e *events) take(received []byte, now time.Time) {
	e.any = true
	if !*stream {
		return
	}
	counts := phase.Load() == measuring
	for len(received) > 0 {
		end := bytes.IndexByte(received, '\n')
		if end < 0 {
			e.partial = append(e.partial, received...)
			return
		}
		line := received[:end]
		received = received[end+1:]
		if len(e.partial) > 0 {
			e.partial = append(e.partial, line...)
			e.line(e.partial, now, counts)
			e.partial = e.partial[:0]
		} else if len(line) > 1 {
			e.line(line, now, counts)
		}
	}
}

func (e *events) line(line []byte, now time.Time, counts bool) {
	if !bytes.HasPrefix(line, data) {
		return
	}
	if bytes.HasPrefix(line, done) {
		e.finished = true
		return
	}
	if counts {
		chunks.Add(1)
		if e.last.IsZero() {
			ttft.add(now.Sub(e.due))
		} else {
			gaps.add(now.Sub(e.last))
		}
		if at := bytes.Index(line, text); at >= 0 && len(line) >= at+len(text)+16 {
			// 0 if it is not the time, but what a proxy made of it.
			if stamp := number16(line[at+len(text):][:16]); stamp > 0 {
				transit.add(time.Duration(now.UnixNano() - stamp))
			}
		}
	}
	e.last = now
}

func number16(digits []byte) int64 {
	high, low := number(digits[:8], 16), number(digits[8:], 16)
	if high < 0 || low < 0 {
		return 0
	}
	return int64(high)<<32 | int64(low)
}

// end says what is wrong with an answer that ended in good order by HTTP's rules.
func (e *events) end() error {
	if *stream && !e.finished {
		return errors.New("stream ended without [DONE]")
	}
	if !e.any {
		return errors.New("empty answer")
	}
	return nil
}

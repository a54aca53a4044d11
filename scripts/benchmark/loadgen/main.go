// loadgen puts load on an OpenAI-compatible server for a fixed time and prints one JSON object.
// Go's standard library only.
//
//	loadgen -url http://127.0.0.1:8888 -c 32 -duration 3s                     closed loop, JSON
//	loadgen -url http://127.0.0.1:8888 -c 32 -duration 3s -rate 1000          open loop: 1000 a second
//	loadgen -url http://127.0.0.1:8888 -c 128 -duration 3s -stream -tokens 200
//
// Only what falls between the end of -warmup and the end of -duration counts. In the open loop a
// request's latency begins when it was due, not when a connection was free to send it, so a
// stall costs all the requests that it held up (no coordinated omission). -pids are the proxy's
// first processes; CPU and memory are theirs and their descendants'.
//
// Answers are parsed by hand, without allocations: a client made of net/http would need more CPU
// than the faster contestants.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/url"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	warming = iota
	measuring
	over
)

var (
	phase  atomic.Int32
	target string
	reqs   []byte

	concurrency = flag.Int("c", 32, "connections, each with one request at a time")
	address     = flag.String("url", "http://127.0.0.1:8888", "where; a path in it is ignored")
	duration    = flag.Duration("duration", 3*time.Second, "how long to measure")
	warmup      = flag.Duration("warmup", time.Second, "how long to run before")
	fewest      = flag.Int64("fewest", 0, "measure longer, up to half a minute, until so many requests are counted")
	fewestParts = flag.Int64("fewest-chunks", 0, "the same with chunks")
	rate        = flag.Float64("rate", 0, "requests per second, at random times (Poisson); 0: closed loop")
	stream      = flag.Bool("stream", false, "ask for a streamed answer")
	tokens      = flag.Int("tokens", 100, "max_tokens")
	prompt      = flag.Int("prompt", 400, "bytes of prompt")
	messages    = flag.Int("messages", 1, "messages of the prompt; from 2 on, each connection has conversations")
	model       = flag.String("model", "m", "model")
	key         = flag.String("key", "none", "API key")
	fresh       = flag.Bool("new-connection", false, "a new connection for every request")
	spread      = flag.Duration("spread", 0, "time over which the connections start")
	pids        = flag.String("pids", "", "comma separated process ids of the proxy")
	serverPids  = flag.String("server-pids", "", "of the server behind it")
	feedURL     = flag.String("feed", "", "http URL of a websocket to listen to meanwhile")
	scrapeURL   = flag.String("scrape", "", "URL to GET every second meanwhile")

	latency, service, ttft, gaps, transit histogram

	requests, chunks, answerBytes, failures, connects atomic.Int64
	feedMessages, scrapes, scrapeNanos, sidesFailed   atomic.Int64
	firstFailure                                      atomic.Value
)

// patience is how much longer than -duration a measurement may last.
const patience = 30 * time.Second

// isTooShort reports whether too little was counted, as in a short measurement on a busy machine.
func isTooShort() bool {
	return failures.Load() == 0 && (requests.Load() < *fewest || chunks.Load() < *fewestParts)
}

func fail(err error) {
	if phase.Load() == over {
		return
	}
	failures.Add(1)
	firstFailure.CompareAndSwap(nil, err.Error())
}

// client is one connection and the request under way on it.
type client struct {
	net.Conn
	number   int
	turn     int
	turns    []byte
	in       *bufio.Reader
	shared   atomic.Pointer[net.Conn] // the same connection, for main to end
	progress atomic.Int64             // Unix nanoseconds of the last byte while waiting, else 0
	events   events
}

func (c *client) connect() error {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	if *fresh {
		// Closed connections keep their ports for a while: from one address there are too few.
		next := byte(connects.Load()%100 + 1)
		dialer.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 1, next)}
		dialer.Control = choosePortLate
	}
	connection, err := dialer.Dial("tcp", target)
	if err != nil {
		return err
	}
	connects.Add(1)
	c.Conn = connection
	c.shared.Store(&connection)
	if phase.Load() == over {
		c.end()
	}
	if c.in == nil {
		c.in = bufio.NewReaderSize(connection, 65536)
	} else {
		c.in.Reset(connection)
	}
	return nil
}

// choosePortLate lets the kernel choose the port when it knows the other end, too.
func choosePortLate(_, _ string, raw syscall.RawConn) error {
	return raw.Control(func(descriptor uintptr) {
		syscall.SetsockoptInt(int(descriptor), syscall.IPPROTO_IP, 24 /* IP_BIND_ADDRESS_NO_PORT */, 1)
	})
}

// end makes what the client waits for fail. There is no timer per request: that would cost as much
// as parsing the answer.
func (c *client) end() {
	if connection := c.shared.Load(); connection != nil {
		(*connection).SetDeadline(time.Unix(1, 0))
	}
}

func (c *client) drop() {
	if c.Conn != nil {
		c.Close()
		c.Conn = nil
	}
}

// exchange sends one request that was due at a time and reads its answer.
func (c *client) exchange(due time.Time) {
	if c.Conn == nil {
		if err := c.connect(); err != nil {
			fail(err)
			time.Sleep(10 * time.Millisecond)
			return
		}
	}
	sent := time.Now()
	c.progress.Store(sent.UnixNano())
	defer c.progress.Store(0)
	c.events.begin(due)
	keep, err := c.answer()
	if err != nil {
		fail(err)
		c.drop()
		return
	}
	if !keep || *fresh {
		c.drop()
	}
	if phase.Load() == measuring {
		now := time.Now()
		requests.Add(1)
		latency.add(now.Sub(due))
		service.add(now.Sub(sent))
	}
}

func (c *client) answer() (keep bool, err error) {
	if _, err = c.Write(c.request()); err != nil {
		return false, fmt.Errorf("sending: %w", err)
	}
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return false, fmt.Errorf("no answer: %w", err)
	}
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.1 200")) {
		rest, _ := c.in.Peek(c.in.Buffered())
		return false, fmt.Errorf("answer %q %.300q", line, rest)
	}
	keep = true
	length, chunked := -1, false
	for {
		if line, err = c.in.ReadSlice('\n'); err != nil {
			return false, fmt.Errorf("in the head: %w", err)
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			break
		}
		switch colon := bytes.IndexByte(line, ':'); colon {
		case len("content-length"):
			if bytes.EqualFold(line[:colon], []byte("content-length")) {
				length = number(bytes.TrimSpace(line[colon+1:]), 10)
			}
		case len("transfer-encoding"):
			if bytes.EqualFold(line[:colon], []byte("transfer-encoding")) {
				chunked = true
			}
		case len("connection"):
			if bytes.EqualFold(line[:colon], []byte("connection")) {
				keep = !bytes.Contains(bytes.ToLower(line[colon:]), []byte("close"))
			}
		}
	}
	switch {
	case chunked:
		err = c.readChunked()
	case length >= 0:
		err = c.readBytes(length)
	default:
		keep = false
		err = c.readToEnd()
	}
	if err != nil {
		return false, err
	}
	return keep, c.events.end()
}

func (c *client) readChunked() error {
	for {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return fmt.Errorf("between chunks: %w", err)
		}
		size := number(bytes.TrimRight(line, "\r\n"), 16)
		if size < 0 {
			return fmt.Errorf("chunk size %q", line)
		}
		if size > 0 {
			if err = c.readBytes(size); err != nil {
				return err
			}
		}
		if _, err = c.in.Discard(2); err != nil || size == 0 {
			return err
		}
	}
}

func (c *client) readBytes(n int) error {
	for n > 0 {
		if c.in.Buffered() == 0 {
			if _, err := c.in.Peek(1); err != nil {
				return fmt.Errorf("answer cut: %w", err)
			}
		}
		size := c.in.Buffered()
		if size > n {
			size = n
		}
		data, _ := c.in.Peek(size)
		c.take(data)
		c.in.Discard(size)
		n -= size
	}
	return nil
}

func (c *client) readToEnd() error {
	for {
		if _, err := c.in.Peek(1); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		c.readBytes(c.in.Buffered())
	}
}

func (c *client) take(data []byte) {
	now := time.Now()
	c.progress.Store(now.UnixNano())
	if phase.Load() == measuring {
		answerBytes.Add(int64(len(data)))
	}
	c.events.take(data, now)
}

// number parses digits of a base; -1 if there are none, or others.
func number(digits []byte, base int) int {
	if len(digits) == 0 || len(digits) > 15 {
		return -1
	}
	n := 0
	for _, digit := range digits {
		switch {
		case digit >= '0' && digit <= '9':
			digit -= '0'
		case digit >= 'a' && digit <= 'f':
			digit -= 'a' - 10
		case digit >= 'A' && digit <= 'F':
			digit -= 'A' - 10
		default:
			return -1
		}
		if int(digit) >= base {
			return -1
		}
		n = n*base + int(digit)
	}
	return n
}

// -- load -------------------------------------------------------------------------------------

func closedLoop(c *client, wait time.Duration) {
	time.Sleep(wait)
	for phase.Load() != over {
		c.exchange(time.Now())
	}
	c.drop()
}

// schedule hands out due times, as they come, to whichever connection is free. It sleeps in the
// kernel, on a thread of its own: Go's timers may be a millisecond late.
func schedule(due chan<- time.Time) {
	runtime.LockOSThread()
	chance := rand.New(rand.NewSource(1)) // the same times for every contestant
	next := time.Now()
	for phase.Load() != over {
		next = next.Add(time.Duration(chance.ExpFloat64() / *rate * 1e9))
		for wait := time.Until(next); wait > 0; wait = time.Until(next) {
			pause := syscall.NsecToTimespec(wait.Nanoseconds())
			syscall.Nanosleep(&pause, nil) // a signal may end it early
		}
		select {
		case due <- next:
		default:
			fail(errors.New("overloaded: the backlog of due requests is full"))
		}
	}
	close(due)
}

func openLoop(c *client, due <-chan time.Time) {
	for at := range due {
		if phase.Load() == over {
			break
		}
		c.exchange(at)
	}
	c.drop()
}

// rounds is how many turns of a conversation are sent before it begins again.
const rounds = 20

// request returns the next request. In a conversation each turn has two messages more than the last
// one, up to -messages; the conversation of each connection is its own.
func (c *client) request() []byte {
	if *messages < 2 {
		return reqs
	}
	each := *prompt / *messages
	text := strings.Repeat("lorem ", each/6+1)[:each]
	head := fmt.Sprintf(`{"model":"%s","max_tokens":%d,"messages":[{"role":"system","content":"conversation %d"}`,
		*model, *tokens, c.number)
	count := *messages - 2*(rounds-1-c.turn%rounds)
	if count < 2 {
		count = 2
	}
	c.turn++
	body := append(c.turns[:0], head...)
	for i := 1; i < count; i++ {
		role := "user"
		if i%2 == 0 {
			role = "assistant"
		}
		body = append(body, `,{"role":"`...)
		body = append(body, role...)
		body = append(body, `","content":"`...)
		body = append(body, text...)
		body = append(body, `"}`...)
	}
	body = append(body, "]}"...)
	c.turns = body
	return framed(string(body))
}

func request() []byte {
	streamed := ""
	if *stream {
		streamed = `"stream":true,`
	}
	return framed(fmt.Sprintf(`{"model":"%s",%s"max_tokens":%d,"messages":[{"role":"user","content":"%s"}]}`,
		*model, streamed, *tokens, strings.Repeat("lorem ", *prompt/6+1)[:*prompt]))
}

func framed(body string) []byte {
	connection := ""
	if *fresh {
		connection = "Connection: close\r\n"
	}
	return []byte(fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\n%s"+
		"Accept: application/json\r\nUser-Agent: OpenAI/Python 1.60.0\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", target, connection, *key, len(body), body))
}

func main() {
	flag.Parse()
	where, err := url.Parse(*address)
	if err != nil || where.Host == "" {
		fmt.Fprintf(os.Stderr, "loadgen: not a URL: %s\n", *address)
		os.Exit(2)
	}
	target = where.Host
	reqs = request()

	if *feedURL != "" {
		go listen(*feedURL)
	}
	if *scrapeURL != "" {
		go scrape(*scrapeURL)
	}
	clients := make([]*client, *concurrency)
	due := make(chan time.Time, 100000)
	var all sync.WaitGroup
	for i := range clients {
		c := &client{number: i}
		clients[i] = c
		all.Add(1)
		wait := *spread * time.Duration(i) / time.Duration(*concurrency)
		go func() {
			defer all.Done()
			if *rate > 0 {
				openLoop(c, due)
			} else {
				closedLoop(c, wait)
			}
		}()
	}
	if *rate > 0 {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1) // for that thread
		go schedule(due)
	}

	time.Sleep(*warmup)
	before := sample()
	phase.Store(measuring)
	began := time.Now()
	time.Sleep(*duration)
	for isTooShort() && time.Since(began) < *duration+patience {
		time.Sleep(10 * time.Millisecond)
	}
	elapsed := time.Since(began).Seconds()
	phase.Store(over)
	after := sample()
	silent := 0
	for _, c := range clients {
		c.end()
		if since := c.progress.Load(); since != 0 && time.Since(time.Unix(0, since)) > 2*time.Second {
			silent++
		}
	}
	all.Wait()

	result := map[string]any{
		"seconds": elapsed, "requests": requests.Load(), "chunks": chunks.Load(), "bytes": answerBytes.Load(),
		"failures": failures.Load(), "silent": silent, "connects": connects.Load(),
		"first_failure": firstFailure.Load(),
		"latency_ms":    latency.summary(), "service_ms": service.summary(), "ttft_ms": ttft.summary(),
		"gap_ms": gaps.summary(), "transit_ms": transit.summary(),
		"proxy_cpu_s": after.proxy - before.proxy, "server_cpu_s": after.server - before.server,
		"load_cpu_s": after.load - before.load, "machine_cpu_s": after.machine - before.machine,
		"rss_mb": after.rss, "descriptors": after.descriptors,
		"feed_messages": feedMessages.Load(), "scrapes": scrapes.Load(),
		"scrape_ms": float64(scrapeNanos.Load()) / 1e6, "side_failures": sidesFailed.Load(),
	}
	if err = json.NewEncoder(os.Stdout).Encode(result); err != nil {
		os.Exit(1)
	}
}

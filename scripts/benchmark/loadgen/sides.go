package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"time"
)

// get opens a connection and sends a GET with these further header lines.
func get(address, fields string) (net.Conn, *bufio.Reader, error) {
	where, err := url.Parse(address)
	if err != nil {
		return nil, nil, err
	}
	connection, err := net.DialTimeout("tcp", where.Host, 5*time.Second)
	if err != nil {
		return nil, nil, err
	}
	connection.SetDeadline(time.Now().Add(*warmup + *duration + patience + 5*time.Second))
	in := bufio.NewReaderSize(connection, 65536)
	_, err = fmt.Fprintf(connection, "GET %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", where.RequestURI(), where.Host, fields)
	if err != nil {
		connection.Close()
	}
	return connection, in, err
}

// scrape gets a page once a second, as Prometheus would at its most eager.
func scrape(address string) {
	for ; phase.Load() != over; time.Sleep(time.Second) {
		began := time.Now()
		connection, in, err := get(address, "Connection: close\r\n")
		if err == nil {
			var status string
			if status, err = in.ReadString('\n'); err == nil && !strings.Contains(status, " 200") {
				err = fmt.Errorf("scrape: %s", status)
			}
			if _, ending := io.Copy(io.Discard, in); err == nil {
				err = ending
			}
			connection.Close()
		}
		if phase.Load() == over {
			return
		}
		if err != nil {
			sidesFailed.Add(1)
			continue
		}
		scrapes.Add(1)
		if took := time.Since(began).Nanoseconds(); took > scrapeNanos.Load() {
			scrapeNanos.Store(took)
		}
	}
}

// listen is a client of a websocket that drops what it gets and answers pings.
func listen(address string) {
	connection, in, err := get(address, "Connection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n")
	if err != nil {
		sidesFailed.Add(1)
		return
	}
	defer connection.Close()
	for line := "x"; line != "\r\n"; {
		if line, err = in.ReadString('\n'); err != nil {
			sidesFailed.Add(1)
			return
		}
	}
	for {
		kind, payload, err := frame(in)
		if err != nil {
			if phase.Load() != over {
				sidesFailed.Add(1)
			}
			return
		}
		switch kind & 15 {
		case 1, 2:
			feedMessages.Add(1)
		case 9: // ping; a pong masked with zeros is still masked
			reply := append([]byte{0x8a, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...)
			if _, err = connection.Write(reply); err != nil {
				return
			}
		}
	}
}

func frame(in *bufio.Reader) (kind byte, payload []byte, err error) {
	var head [2]byte
	if _, err = io.ReadFull(in, head[:]); err != nil {
		return
	}
	size := uint64(head[1] & 127)
	switch size {
	case 126:
		var long uint16
		err = binary.Read(in, binary.BigEndian, &long)
		size = uint64(long)
	case 127:
		err = binary.Read(in, binary.BigEndian, &size)
	}
	if err != nil {
		return
	}
	payload = make([]byte, size)
	_, err = io.ReadFull(in, payload)
	return head[0], payload, err
}

// server answers like a fleet of vLLM servers, at a few microseconds per request, so that what is
// measured is the proxy in front of it. Go's standard library only.
//
//	server -ports 9101,9102,9103
//
// How it answers is the same for all ports and set while it runs, because not every proxy passes
// unknown headers or fields on:
//
//	GET /bench/set?ttft_ms=20&interval_ms=20&answer_bytes=65536
//
// The number of chunks is the request's max_tokens. A chunk's text is the time it was written (16
// hexadecimal digits, nanoseconds since 1970): the load generator, on the same machine, knows from
// it how long the chunk was under way.
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// behaviour is replaced as a whole by /bench/set, and read once per request.
type behaviour struct {
	ttft, interval time.Duration
	answer         []byte
}

var (
	current atomic.Pointer[behaviour]
	running atomic.Int64
	served  atomic.Int64
)

const (
	sseHead = "HTTP/1.1 200 OK\r\ndate: Sun, 23 Nov 2025 08:16:40 GMT\r\nserver: uvicorn\r\n" +
		"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
	chunkBefore = `data: {"id":"chatcmpl-9c1d4d1c8b7d4a0e","object":"chat.completion.chunk",` +
		`"created":1763797000,"model":"m","choices":[{"index":0,"delta":{"content":"`
	chunkAfter = `"},"logprobs":null,"finish_reason":null}]}` + "\n\n"
	lastAfter  = `"},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}` + "\n\n"
	textBytes  = 16
	sseEnd     = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
	hexDigits  = "0123456789abcdef"
)

var scaleOutDisabled = respond("403 Forbidden", "application/json",
	`{"error":{"message":"Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out `+
		`to enable them.","type":"PermissionDeniedError","param":null,"code":403}}`)

func answer(size int) []byte {
	before := `{"id":"chatcmpl-9c1d4d1c8b7d4a0e","object":"chat.completion","created":1763797000,` +
		`"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"`
	after := `"},"logprobs":null,"finish_reason":"stop"}],` +
		`"usage":{"prompt_tokens":10,"total_tokens":20,"completion_tokens":10}}`
	text := size - len(before) - len(after)
	if text < 0 {
		text = 0
	}
	return respond("200 OK", "application/json", before+strings.Repeat("x", text)+after)
}

func respond(status, kind, body string) []byte {
	return []byte(fmt.Sprintf("HTTP/1.1 %s\r\ndate: Sun, 23 Nov 2025 08:16:40 GMT\r\nserver: uvicorn\r\n"+
		"content-type: %s\r\ncontent-length: %d\r\n\r\n%s", status, kind, len(body), body))
}

func set(query string) error {
	values, err := url.ParseQuery(query)
	if err != nil {
		return err
	}
	number := func(name string, otherwise float64) float64 {
		if v := values.Get(name); v != "" {
			n, bad := strconv.ParseFloat(v, 64)
			if bad != nil {
				err = bad
			}
			return n
		}
		return otherwise
	}
	next := &behaviour{
		ttft:     time.Duration(number("ttft_ms", 0) * 1e6),
		interval: time.Duration(number("interval_ms", 0) * 1e6),
		answer:   answer(int(number("answer_bytes", 400))),
	}
	if err == nil {
		current.Store(next)
	}
	return err
}

// connection is one accepted connection with its buffers.
type connection struct {
	net.Conn
	in   *bufio.Reader
	body []byte
}

func (c *connection) serve() {
	defer c.Close()
	for {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return
		}
		parts := strings.SplitN(string(line), " ", 3)
		if len(parts) != 3 {
			return
		}
		method, target := parts[0], parts[1]
		length, chunked, last := 0, false, false
		for {
			line, err = c.in.ReadSlice('\n')
			if err != nil {
				return
			}
			line = bytes.TrimRight(line, "\r\n")
			if len(line) == 0 {
				break
			}
			// Only names of these lengths matter here.
			switch colon := bytes.IndexByte(line, ':'); colon {
			case len("content-length"):
				if bytes.EqualFold(line[:colon], []byte("content-length")) {
					length, _ = strconv.Atoi(strings.TrimSpace(string(line[colon+1:])))
				}
			case len("transfer-encoding"):
				if bytes.EqualFold(line[:colon], []byte("transfer-encoding")) {
					chunked = true
				}
			case len("connection"):
				if bytes.EqualFold(line[:colon], []byte("connection")) {
					last = bytes.Contains(bytes.ToLower(line[colon:]), []byte("close"))
				}
			}
		}
		if err = c.readBody(length, chunked); err != nil {
			return
		}
		switch {
		case method == "POST" && target == "/v1/chat/completions":
			err = c.infer()
		case method == "POST" && target == "/v1/chat/completions/render":
			// Asked by routers that want the tokens of a prompt; vLLM's answer unless it was
			// started with --enable-scale-out.
			_, err = c.Write(scaleOutDisabled)
		case method == "POST":
			_, err = c.Write(respond("404 Not Found", "application/json", `{"detail":"Not Found"}`))
		default:
			err = c.tell(target)
		}
		if err != nil || last {
			return
		}
	}
}

func (c *connection) readBody(length int, chunked bool) error {
	c.body = c.body[:0]
	if !chunked {
		return c.more(length)
	}
	for {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		size, err := strconv.ParseInt(strings.TrimSpace(string(line)), 16, 32)
		if err != nil {
			return err
		}
		if err = c.more(int(size)); err != nil {
			return err
		}
		if _, err = c.in.ReadSlice('\n'); err != nil || size == 0 {
			return err
		}
	}
}

func (c *connection) more(n int) error {
	have := len(c.body)
	if have+n > cap(c.body) {
		grown := make([]byte, have, have+n)
		copy(grown, c.body)
		c.body = grown
	}
	c.body = c.body[:have+n]
	_, err := io.ReadFull(c.in, c.body[have:])
	return err
}

// field returns what follows `"name":` at either end of the body, or nothing: a long prompt in
// between is not looked at.
func (c *connection) field(name string) []byte {
	ends := [][]byte{c.body}
	if len(c.body) > 4096 {
		ends = [][]byte{c.body[:2048], c.body[len(c.body)-2048:]}
	}
	for _, end := range ends {
		if at := bytes.Index(end, []byte(name)); at >= 0 {
			return bytes.TrimLeft(end[at+len(name):], " ")
		}
	}
	return nil
}

func (c *connection) infer() error {
	running.Add(1)
	defer running.Add(-1)
	served.Add(1)
	now := current.Load()
	if !bytes.HasPrefix(c.field(`"stream":`), []byte("true")) {
		if now.ttft > 0 {
			time.Sleep(now.ttft)
		}
		_, err := c.Write(now.answer)
		return err
	}
	tokens := 0
	for _, digit := range c.field(`"max_tokens":`) {
		if digit < '0' || digit > '9' {
			break
		}
		tokens = tokens*10 + int(digit-'0')
	}
	return c.stream(now, tokens)
}

// stream sends the head at once, as vLLM does, and then a chunk per write.
func (c *connection) stream(now *behaviour, tokens int) error {
	if _, err := io.WriteString(c, sseHead); err != nil {
		return err
	}
	chunk, text := makeChunk(chunkAfter)
	// Absolute times: a stream that fell behind catches up instead of offering less.
	due := time.Now().Add(now.ttft)
	for i := 0; i < tokens; i++ {
		if wait := time.Until(due); wait > 0 {
			time.Sleep(wait)
		}
		due = due.Add(now.interval)
		if i == tokens-1 {
			chunk, text = makeChunk(lastAfter)
		}
		stamp := uint64(time.Now().UnixNano())
		for place := textBytes - 1; place >= 0; place-- {
			text[place] = hexDigits[stamp&15]
			stamp >>= 4
		}
		if _, err := c.Write(chunk); err != nil {
			return err
		}
	}
	_, err := io.WriteString(c, sseEnd)
	return err
}

// makeChunk returns a chunk of the stream with its framing, and the place of its text in it.
func makeChunk(after string) (chunk, text []byte) {
	size := len(chunkBefore) + textBytes + len(after)
	chunk = []byte(fmt.Sprintf("%x\r\n%s%s%s\r\n", size, chunkBefore, strings.Repeat("0", textBytes), after))
	return chunk, chunk[bytes.Index(chunk, []byte(chunkBefore))+len(chunkBefore):][:textBytes]
}

// tell answers GET.
func (c *connection) tell(target string) error {
	path, query, _ := strings.Cut(target, "?")
	status, kind, body := "200 OK", "application/json", "{}"
	switch path {
	case "/health", "/ping":
	case "/v1/models":
		body = `{"object":"list","data":[{"id":"m","object":"model","created":1763797000,"owned_by":"vllm",` +
			`"root":"m","parent":null,"max_model_len":8192,"permission":[]}]}`
	case "/get_model_info", "/get_server_info", "/server_info":
		body = `{"model_path":"m","dp_size":1}`
	case "/version":
		body = `{"version":"0.32.0"}`
	case "/metrics":
		kind = "text/plain; version=0.0.4; charset=utf-8"
		body = metrics()
	case "/bench/set":
		if err := set(query); err != nil {
			status, body = "400 Bad Request", fmt.Sprintf("%q", err.Error())
		}
	case "/bench/stats":
		body = fmt.Sprintf(`{"running":%d,"served":%d}`, running.Load(), served.Load())
	default:
		status = "404 Not Found"
	}
	_, err := c.Write(respond(status, kind, body))
	return err
}

// metrics is what a scrape of vLLM carries that a router may want, at about its usual size.
func metrics() string {
	var b strings.Builder
	labels := `{engine="0",model_name="m"}`
	gauge := func(name string, value float64) {
		fmt.Fprintf(&b, "# HELP %s x.\n# TYPE %s gauge\n%s%s %v\n", name, name, name, labels, value)
	}
	gauge("vllm:num_requests_running", 0)
	gauge("vllm:num_requests_waiting", 0)
	gauge("vllm:kv_cache_usage_perc", 0.1)
	gauge("vllm:engine_sleep_state", 0)
	for _, name := range []string{"time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"} {
		fmt.Fprintf(&b, "# HELP vllm:%s Histogram.\n# TYPE vllm:%s histogram\n", name, name)
		for i := 0; i < 20; i++ {
			fmt.Fprintf(&b, "vllm:%s_bucket{engine=\"0\",le=\"%g\",model_name=\"m\"} 0.0\n", name, 0.001*float64(int(1)<<i))
		}
		fmt.Fprintf(&b, "vllm:%s_count%s 0.0\nvllm:%s_sum%s 0.0\n", name, labels, name, labels)
	}
	return b.String()
}

func main() {
	ports := flag.String("ports", "9101", "comma separated; 0 is any free port; the ports in use are printed")
	flag.Parse()
	if err := set(""); err != nil {
		log.Fatal(err)
	}
	var used []string
	for _, port := range strings.Split(*ports, ",") {
		listener, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			log.Fatal(err)
		}
		used = append(used, strconv.Itoa(listener.Addr().(*net.TCPAddr).Port))
		go func() {
			for {
				accepted, err := listener.Accept()
				if err != nil {
					log.Fatal(err)
				}
				go (&connection{Conn: accepted, in: bufio.NewReaderSize(accepted, 16384)}).serve()
			}
		}()
	}
	fmt.Println(strings.Join(used, ","))
	// Exits with its parent process: stdin is closed then, however the parent ended.
	io.Copy(io.Discard, os.Stdin)
}

"""The listening side: sockets, connections, and the HTTP/1.1 server called the lane."""

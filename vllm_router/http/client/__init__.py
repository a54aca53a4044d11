"""HTTP/1.1 client on llhttp: connections, pools, name resolution, and a transport for httpx."""

"""HTTP/1.1 server on llhttp, and the listener of the public port."""

"""The connecting side: DNS, connection pools, and the transport for httpx."""

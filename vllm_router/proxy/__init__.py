"""One exchange: a client's request, its attempts on servers, the relayed answer."""

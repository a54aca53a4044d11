"""Which server gets a request, and what happens when it fails. Pure."""

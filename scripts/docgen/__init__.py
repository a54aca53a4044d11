"""Pages of the documentation that are written from the code, and the hooks of the site."""

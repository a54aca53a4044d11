"""Sources of servers: files, HTTP, DNS, Kubernetes. Each hands over complete sets of targets."""

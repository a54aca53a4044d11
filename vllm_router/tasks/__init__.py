"""The tasks that run beside the exchanges: probes, the configuration watcher, the feed."""

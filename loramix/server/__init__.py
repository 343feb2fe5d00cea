"""The HTTP server: endpoints, limits and access control in one process, the engine in a worker process."""

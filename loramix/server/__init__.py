"""The HTTP server: endpoints, limits and access in one process, the engine in a worker process."""

"""Chat templates: rendered in a sandbox, and the tokens that end an answer."""

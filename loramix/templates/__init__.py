"""Chat templates: sandboxed rendering, text normalization, and the tokens that end an answer."""

"""Defaults that several parts share; importing the engine for them would load llama.cpp."""

CONTEXTS = 3
"""Mixes whose KV an engine keeps, the bare base's included; a conversation rarely moves between more."""
SERVER_CONTEXTS = 4
"""The same in the server, whose users ask for different skills at once."""

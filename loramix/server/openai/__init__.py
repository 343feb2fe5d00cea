"""Endpoints of the OpenAI protocol."""

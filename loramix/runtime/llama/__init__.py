"""The only owner of llama.cpp handles: model, vocabulary, contexts, hidden states."""

"""A server with OpenAI's and DashScope's dialects over one backend."""

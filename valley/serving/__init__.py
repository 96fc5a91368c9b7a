"""The assistant behind HTTP: schema, engine, API and the chat page."""

"""The implementations: one folder or file a backend, each a table {op name: kernel} for the dispatcher."""

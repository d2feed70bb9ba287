"""What other libraries expect to find: each module here needs an optional extra and is imported only when asked for."""

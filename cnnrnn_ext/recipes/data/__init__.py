"""The recipes' data: generators of the embedded sets, readers of the user's own."""

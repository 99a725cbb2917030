"""The `hybrid` command: words in, calls, words out; `cli.main.run` is its entry point."""

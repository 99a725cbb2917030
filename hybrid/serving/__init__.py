"""A loaded model over HTTP, and its page; `serving.server.run` is the way in."""

"""From a request body to the model, the session and the prompt that routing works with."""

"""What routing reads of a request body: model, length, hashes of its blocks."""

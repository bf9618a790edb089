"""Text: files become documents, documents become shards of word pieces, shards become batches."""

"""Images: labelled files become shards, shards become batches."""

"""What a finished conversion leaves beside the shards: card, totals, description, manifest."""

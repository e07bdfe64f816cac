"""The one replay: schema, storage, samplers, sum tree, staleness index, mixing."""

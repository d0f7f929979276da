"""The tools the agents use: plain typed functions that run inside one durable step."""

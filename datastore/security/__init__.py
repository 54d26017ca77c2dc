"""Who may speak: the secret of a deployment, the challenge of each connection, sealed datagrams, strict reading of text."""

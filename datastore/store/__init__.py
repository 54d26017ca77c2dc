"""The store: partitions, the hash table in shared memory, the wire protocol, the server and the client."""

"""Boards on the network: the server that runs on one, and measuring on them through TVM's RPC."""

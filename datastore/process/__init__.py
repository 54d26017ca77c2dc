"""The store as a process, put together.

server        the compiled loop that serves clients and peers
member        what follows the coordinator between its turns
store         both, made from a configuration, until they are told to stop
"""

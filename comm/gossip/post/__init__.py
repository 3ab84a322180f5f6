"""The port of a real machine: messages over TCP, in order and once each, also across broken connections.

post.py        Post: one machine's port, its threads, and drive(), which runs scripts on it
link.py        what is to be sent to one other machine and what came from it; whether that one lives
connection.py  one TCP connection: frames out, frames in
frame.py       the bytes of a frame;  handshake.py  those of a greeting
door.py        open_post(): the ranks of a job;  machines.py  meet(): machines that find one another by address
"""

"""What runs in the decoder process: it opens media files, and the rest of Valley never does.

A demuxer or decoder that is fed a hostile or broken file can hang, crash or eat all memory. So files are opened here only,
in a child process of the worker (`valley.media.sandbox` is the other end), which can be killed without harm. The modules
import each other by relative names and nothing else of Valley, so that the child starts in a fraction of a second.

    child       the process: answers one request after the other
    wire        messages between parent and child
    problems    what can be wrong with a file, as the parent will raise it
    containers  what the first bytes say; anything unknown is refused before a demuxer sees it
    wholeness   whether a file is as long as its own structure says
    clip        a video's packets and times, without decoding
    planned     the frames wanted, by PyAV, decoding as few pictures as possible
    exhaustive  the frames wanted, by PyAV, decoding everything: the arbiter when something is odd
    decord      the same frames by decord, where it is right
    torchcodec  the same frames by torchcodec, where it is right
    still       the one frame of an image, by Pillow
"""

"""What runs in the decoder process: it opens media files, and the rest of Valley never does.

A demuxer or decoder that is fed a hostile or broken file can hang, crash or eat all memory. So files are opened here
only, in a child process of the worker (`valley.media.sandbox` is the other end), which can be killed without harm. The
modules import nothing else of Valley, so that the child starts in a fraction of a second.

    child       the process: answers one request after the other
    wire        messages between parent and child
    slots       pictures in memory that both see
    bounds      what one file may ask for
    isolation   no network for this process
    memory      how much memory it may take
    problems    what can be wrong with a file, as the parent will raise it
    containers  what the first bytes say; anything unknown is refused before a demuxer sees it
    boxes       what an mp4 or mov is made of
    elements    what a Matroska or WebM is made of
    orientation how stored pictures are turned and mirrored to be upright
    wholeness   whether a file is as long as its own structure says
    clip        a video's packets and times, without decoding
    pyav        the frames wanted, by PyAV
    nal         what packets of H.264 and HEVC are made of
    obu         what packets of AV1 are made of
    planned     … decoding as few pictures as possible
    exhaustive  … decoding everything: the arbiter when something is odd
    decord      the same frames by decord, where it is right
    torchcodec  the same frames by torchcodec, where it is right
    still       the one frame of an image, by Pillow
"""

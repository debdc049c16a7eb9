"""The server: OpenAI's API over HTTP in front, the engine in a process of its own behind a pipe.

Words
    *front*   the process that speaks HTTP: it parses, tokenises, detokenises and streams. No model is here.
    *worker*  the process with the models and the :class:`fpcompile.engine.engine.Engine`; nothing else runs
              in its interpreter but the reading of messages.
    *ask*     a request of the front to the worker; *stream*: the front's end of one that generates.
    *account* what an API key stands for: a tenant, the SLO classes that it may name, the floors of its SLOs.

Everything that crosses the pipe is in :mod:`fpcompile.serving.server.messages`. Both processes read the
machine's monotonic clock, so that the time to first token starts in the front.
"""

"""One module per framework: how its documentation says that its collator is made. Runs in that framework's environment.

Each has ``SET_UPS`` (name to what it is, in words) and ``collator(asked, parts)``, which returns a
function from rows to the batch that the framework hands to the model, under the names that the model gets.
What a framework does not offer is said with :class:`collating.parts.Unsupported`.
"""

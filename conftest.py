"""The plugin comes in by its entry point; nothing to do here but let tests drive pytest itself."""

pytest_plugins = ["pytester"]

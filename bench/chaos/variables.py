"""What the harness tells its processes, beside Kamiyo's own settings: names of environment variables, and a signal."""

import signal

#: Where marks are written: straight to PostgreSQL, past the proxy.
MARKS_URL = "KAMIYO_CHAOS_MARKS_URL"

#: A file with the fates of events, by id, as JSON.
FATES_FILE = "KAMIYO_CHAOS_FATES"

#: Which fault this build has; unset for none.
BROKEN = "KAMIYO_CHAOS_BROKEN"

#: Makes a process write down where each of its tasks is.
TELL_TASKS = signal.SIGUSR1

"""Name what keeps a database from being brought up to date; each text says what to do.

MigrationFailed
├── UnknownRevision   a newer version migrated it: start that one, or restore the earlier backup
├── RevisionTooOld    older than the baseline: upgrade it with an older version first
├── DatabaseBusy      a lock was held all the time: end that transaction, then try again
└── SqlInUse          an object of the operator depends on one that has to be made anew
"""


class MigrationFailed(Exception):
    """The database is not up to date; the text says what to do."""


class UnknownRevision(MigrationFailed):
    """This version does not know the database's revision."""


class RevisionTooOld(MigrationFailed):
    """The database's revision is one of those that the baseline replaced."""


class DatabaseBusy(MigrationFailed):
    """A lock could not be had, however often it was tried."""


class SqlInUse(MigrationFailed):
    """A function or view cannot be replaced, for something that is not ours depends on it."""

"""Files on disks and on object storage: reading, atomic writing, locks."""

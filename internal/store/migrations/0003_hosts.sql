-- What the server gave each host. Rows stay when the host's document goes, so
-- that no id comes twice.
CREATE TABLE fleet_host (
	host        @KEY PRIMARY KEY, -- id
	resource    TEXT NOT NULL,    -- id of its document
	certificate @BYTES NOT NULL,  -- DER, the newest
	key         @BYTES NOT NULL,  -- SHA-256 of its public key
	old_key     @BYTES,           -- of the one before, until the newest is used
	assigned    @BYTES,           -- SHA-256 of the manifest meant for it
	assigned_us BIGINT NOT NULL,
	written_us  BIGINT NOT NULL   -- by the database's clock
);
CREATE INDEX fleet_host_written ON fleet_host (written_us);

-- When each host was heard of last, and what it said.
CREATE TABLE fleet_presence (
	host       @KEY PRIMARY KEY,
	node       @KEY NOT NULL,     -- process that heard it
	seen_us    BIGINT NOT NULL,
	report     TEXT NOT NULL,     -- JSON
	labels     TEXT NOT NULL,     -- JSON
	written_us BIGINT NOT NULL
);
CREATE INDEX fleet_presence_written ON fleet_presence (written_us);

-- Content by its digest, in parts of 1 MiB. The row of fleet_chunk is written
-- last: without it the parts are nothing.
CREATE TABLE fleet_chunk (
	sha256   @BYTES PRIMARY KEY,
	size     BIGINT NOT NULL,
	added_us BIGINT NOT NULL
);
CREATE TABLE fleet_chunk_part (
	sha256 @BYTES NOT NULL,
	part   BIGINT NOT NULL,
	data   @BYTES NOT NULL,
	PRIMARY KEY (sha256, part)
);

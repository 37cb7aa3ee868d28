-- One counter for the tree: taken first by every writing transaction, so that
-- writers follow one another and the feed has no gaps.
CREATE TABLE revision (
	one  BIGINT PRIMARY KEY CHECK (one = 1),
	last BIGINT NOT NULL
);
INSERT INTO revision (one, last) VALUES (1, 0);

CREATE TABLE document (
	key         @KEY PRIMARY KEY, -- id in lower case
	id          TEXT NOT NULL,
	kind        @KEY NOT NULL,    -- type in lower case
	type        TEXT NOT NULL,
	location    TEXT NOT NULL,
	tags        TEXT NOT NULL,    -- JSON
	properties  TEXT NOT NULL,    -- JSON
	revision    BIGINT NOT NULL,
	created_by  TEXT NOT NULL,
	created_us  BIGINT NOT NULL,
	modified_by TEXT NOT NULL,
	modified_us BIGINT NOT NULL
);
CREATE INDEX document_kind ON document (kind, key);

CREATE TABLE change (
	revision    BIGINT PRIMARY KEY,
	deleted     BOOLEAN NOT NULL,
	key         @KEY NOT NULL,
	id          TEXT NOT NULL,
	type        TEXT NOT NULL,
	location    TEXT NOT NULL,
	tags        TEXT NOT NULL,
	properties  TEXT NOT NULL,
	created_by  TEXT NOT NULL,
	created_us  BIGINT NOT NULL,
	modified_by TEXT NOT NULL,
	modified_us BIGINT NOT NULL
);

CREATE TABLE audit (
	seq     BIGINT PRIMARY KEY,
	at_us   BIGINT NOT NULL,
	actor   TEXT NOT NULL,
	action  TEXT NOT NULL,
	target  TEXT NOT NULL,
	outcome TEXT NOT NULL CHECK (outcome IN ('done', 'refused', 'failed')),
	reason  TEXT NOT NULL,
	detail  TEXT NOT NULL,
	prev    @BYTES NOT NULL,
	hash    @BYTES NOT NULL
);

-- What the fleet knows of each host's TPM. A TPM is one host's.
CREATE TABLE attestation_host (
	host      @KEY PRIMARY KEY,
	tpm       @KEY NOT NULL UNIQUE, -- SHA-256 of the endorsement key, in hex
	standing  @KEY NOT NULL CHECK (standing IN ('pending', 'trusted', 'quarantined')),
	good_us   BIGINT NOT NULL,      -- the last round that was accepted; 0: none
	body      TEXT NOT NULL,        -- JSON
	version   BIGINT NOT NULL
);
CREATE INDEX attestation_host_standing ON attestation_host (standing, host);

-- A challenge is taken out once.
CREATE TABLE attestation_challenge (
	nonce     @BYTES PRIMARY KEY,
	issued_us BIGINT NOT NULL,
	body      TEXT NOT NULL         -- JSON
);
CREATE INDEX attestation_challenge_issued ON attestation_challenge (issued_us);

-- Evidence with its signed result, to be verified again.
CREATE TABLE attestation_archive (
	host      @KEY NOT NULL,
	at_us     BIGINT NOT NULL,
	status    TEXT NOT NULL,
	blob      @BYTES NOT NULL,      -- gzip of JSON
	PRIMARY KEY (host, at_us)
);

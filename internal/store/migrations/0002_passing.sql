-- What is kept for a while and then forgotten: sign-ons under way, refresh
-- tokens, answers to requests that may be repeated.
CREATE TABLE passing (
	key      @KEY PRIMARY KEY,
	value    @BYTES NOT NULL,
	until_us BIGINT NOT NULL
);
CREATE INDEX passing_until ON passing (until_us);

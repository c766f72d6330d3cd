-- The rules of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A1.1 and Table A1), thresholds as in datatrove.
-- reason: the first rule that a document breaks, NULL where it is kept. A signal that is NULL breaks no rule, but a
-- document without words is too short whatever the threshold.
-- signals: gopher
--
-- $min_words = 50 -- words
-- $max_words = 100000 -- words
-- $min_mean_word_length = 3 -- characters
-- $max_mean_word_length = 10 -- characters
-- $max_hash_ratio = 0.1 -- '#' per token
-- $max_ellipsis_ratio = 0.1 -- '...' and '…' per token
-- $max_bullet_lines = 0.9 -- share of lines that begin with a bullet
-- $max_ellipsis_lines = 0.3 -- share of lines that end in an ellipsis
-- $min_letter_words = 0.8 -- share of tokens with a letter
-- $min_stop_words = 2 -- of the be to of and that have with
-- $max_duplicate_lines = 0.3 -- share of lines
-- $max_duplicate_paragraphs = 0.3 -- share of paragraphs
-- $max_duplicate_line_chars = 0.2 -- share of characters
-- $max_duplicate_paragraph_chars = 0.2 -- share of characters
-- $max_top_2_gram = 0.2 -- share of characters
-- $max_top_3_gram = 0.18 -- share of characters
-- $max_top_4_gram = 0.16 -- share of characters
-- $max_duplicate_5_grams = 0.15 -- share of characters
-- $max_duplicate_6_grams = 0.14 -- share of characters
-- $max_duplicate_7_grams = 0.13 -- share of characters
-- $max_duplicate_8_grams = 0.12 -- share of characters
-- $max_duplicate_9_grams = 0.11 -- share of characters
-- $max_duplicate_10_grams = 0.1 -- share of characters

SELECT CASE
    WHEN s.n_words = 0 OR s.n_words < $min_words                        THEN 'too_few_words'
    WHEN s.n_words > $max_words                                         THEN 'too_many_words'
    WHEN s.mean_word_length < $min_mean_word_length                     THEN 'words_too_short'
    WHEN s.mean_word_length > $max_mean_word_length                     THEN 'words_too_long'
    WHEN s.hash_ratio > $max_hash_ratio                                 THEN 'too_many_hashes'
    WHEN s.ellipsis_ratio > $max_ellipsis_ratio                         THEN 'too_many_ellipses'
    WHEN s.bullet_lines > $max_bullet_lines                             THEN 'too_many_bullet_lines'
    WHEN s.ellipsis_lines > $max_ellipsis_lines                         THEN 'too_many_ellipsis_lines'
    WHEN s.letter_words < $min_letter_words                             THEN 'too_few_letter_words'
    WHEN s.stop_words < $min_stop_words                                 THEN 'too_few_stop_words'
    WHEN s.duplicate_lines > $max_duplicate_lines                       THEN 'duplicate_lines'
    WHEN s.duplicate_paragraphs > $max_duplicate_paragraphs             THEN 'duplicate_paragraphs'
    WHEN s.duplicate_line_chars > $max_duplicate_line_chars             THEN 'duplicate_line_chars'
    WHEN s.duplicate_paragraph_chars > $max_duplicate_paragraph_chars   THEN 'duplicate_paragraph_chars'
    WHEN s.top_2_gram > $max_top_2_gram                                 THEN 'top_2_gram'
    WHEN s.top_3_gram > $max_top_3_gram                                 THEN 'top_3_gram'
    WHEN s.top_4_gram > $max_top_4_gram                                 THEN 'top_4_gram'
    WHEN s.duplicate_5_grams > $max_duplicate_5_grams                   THEN 'duplicate_5_grams'
    WHEN s.duplicate_6_grams > $max_duplicate_6_grams                   THEN 'duplicate_6_grams'
    WHEN s.duplicate_7_grams > $max_duplicate_7_grams                   THEN 'duplicate_7_grams'
    WHEN s.duplicate_8_grams > $max_duplicate_8_grams                   THEN 'duplicate_8_grams'
    WHEN s.duplicate_9_grams > $max_duplicate_9_grams                   THEN 'duplicate_9_grams'
    WHEN s.duplicate_10_grams > $max_duplicate_10_grams                 THEN 'duplicate_10_grams'
END AS reason

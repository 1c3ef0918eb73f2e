#!lua name=vla_replay_DIGEST
-- What must happen at once: taking a segment in, making room for it, and the limiters. Loaded under a name that holds
-- a digest of this file, so that clients of different versions do not overwrite each other's functions.
--
-- Frames never pass through here: a client writes them under their final names with an expiry, which is taken away once
-- their row is committed. Nothing is drawn here either: clients hold a copy of the index and follow the streams below.
--
-- Keys under one prefix "{buffer:NAME}:". Completions, 1, 2, 3, ..., number the episodes in the order they became whole;
-- rows number the segments of complete episodes in the same order; both are never used again.
--   state                 packed counters: HEAD, then TABLE for each table
--   config                hash: what clients must agree on
--   row:DIGEST:I          payload of segment I of the episode whose id has this digest
--   fresh                 between the two commands of a transaction that writes rows and commits them: its token
--   image:DIGEST:I:C      frames of camera C; on this server only if state.cameras_here > 0
--   episodes              hash: episode id -> packed EPISODE, task, and for each index (unless complete) SEGMENT
--   order                 list of ids of the stored episodes as they began
--   evicted               list of episode ids that are still remembered for the sake of late retries
--   completed             hash: completion -> episode id
--   live                  stream, id COMPLETION-0: one entry for each complete episode that is stored
--   gone                  stream, id N-0: packed completions that left
--   images_gone           list of packed digest and number of segments: episodes that left, whose images may still lie
--                         on the server of the images; only if state.cameras_apart > 0
--   charged:CLIENT        number of the last charge that this client made; expires
--   by                    hash: counters of complete episodes by task and steps by source
-- and for each table that needs them:
--   priorities:TABLE      packed float at row mod capacity; the highest so far until somebody scores it
--   draws:TABLE           packed count at row mod capacity
--   used:TABLE            hash: completion -> steps of it that may not be drawn any more
--   events:TABLE          stream, id N-0: field p: packed rows and priorities; field x: packed rows that are used up

-- Packed state: doubles, first of the buffer (HEAD), then of each table (TABLE), in the order of read_ and pack_ below.
local HEAD_FORMAT, TABLE_FORMAT = '<ddddddddddddddddd', '<dddddddddddddd'
local HEAD_BYTES, TABLE_BYTES = 136, 112
local BALANCE_AT = 56 -- in TABLE, of balance and sampled, side by side
-- completion (0: not complete), last index (-1: not seen yet), segments seen, steps, status, success, source,
-- intervened, digest, bytes of the task
local EPISODE = '<di4I4I4BBBBc16I2'
local OPEN, COMPLETE, EVICTED = 0, 1, 2
local SEGMENT = '<dd' -- sum of rewards (NaN: not seen), policy version
-- what segments of one episode have in common: digest, source, how many there are, bytes of the id, task, instruction;
-- and of each segment: index, length, is last, success, intervened, policy version, sum of rewards
local RUN, ARRIVAL = '<c16BI2I2I2I2', '<I4I4BBBdd'
local ARRIVAL_BYTES = 27
-- completion, first row, length, segments, source, success, intervened, unused, completed at, digest, bytes of the id,
-- task and instruction
local LIVE = '<ddI4I4BBBBdc16I2I2I2'
local GONE_KEPT, EVENTS_KEPT = 65536, 4096
local MOST_KEYS, MOST_IMAGES_GONE = 4000, 128
local CHARGES_KEPT_MS = 600000

local function number(text) return string.format('%.17g', text) end

-- Whole numbers, as the names of completions and rows are.
local function whole(num) return string.format('%d', num) end

-- Name by name, in a table made at once: a loop over names costs several times as much, and so does a table that grows.
local function read_head(packed)
  local capacity, remembered, cameras_here, archiving, archived, steps, complete, completion, row,
    gone, inserted, duplicates, evicted_steps, broken, cameras_apart, shards, discarded =
    struct.unpack(HEAD_FORMAT, packed)
  return {
    capacity = capacity, remembered = remembered, cameras_here = cameras_here, archiving = archiving,
    archived = archived, steps = steps, complete = complete, completion = completion, row = row, gone = gone,
    inserted = inserted, duplicates = duplicates, evicted_steps = evicted_steps, broken = broken,
    cameras_apart = cameras_apart, shards = shards, discarded = discarded}
end

local function read_table(packed, at, index)
  local min_steps, ratio, buffer, max_draws, prioritised, queue, drawable, balance, sampled,
    inserts_waited, samples_waited, max_priority, events, lost = struct.unpack(TABLE_FORMAT, packed, at)
  return {
    index = index, min_steps = min_steps, ratio = ratio, buffer = buffer, max_draws = max_draws,
    prioritised = prioritised, queue = queue, drawable = drawable, balance = balance, sampled = sampled,
    inserts_waited = inserts_waited, samples_waited = samples_waited, max_priority = max_priority, events = events,
    lost = lost}
end

local function pack_head(s)
  return struct.pack(HEAD_FORMAT,
    s.capacity, s.remembered, s.cameras_here, s.archiving, s.archived, s.steps, s.complete, s.completion, s.row,
    s.gone, s.inserted, s.duplicates, s.evicted_steps, s.broken, s.cameras_apart, s.shards, s.discarded)
end

local function pack_table(t)
  return struct.pack(TABLE_FORMAT,
    t.min_steps, t.ratio, t.buffer, t.max_draws, t.prioritised, t.queue, t.drawable, t.balance, t.sampled,
    t.inserts_waited, t.samples_waited, t.max_priority, t.events, t.lost)
end

local function read_state(keys)
  local packed = redis.call('GET', keys[1])
  if not packed then error('NOBUFFER nothing at ' .. keys[1]) end
  return packed
end

local function open_buffer(keys)
  local packed = read_state(keys)
  local b = {key = keys[1], prefix = string.sub(keys[1], 1, -6), left = {}, removed = {}, changed = {}, by = {}, tables = {}}
  b.s = read_head(packed)
  for at = HEAD_BYTES + 1, #packed, TABLE_BYTES do
    local t = read_table(packed, at, #b.tables)
    b.has_rings = b.has_rings or t.prioritised == 1 or (t.max_draws > 0 and t.queue == 0)
    b.tables[#b.tables + 1] = t
  end
  return b
end

-- Added up and written once a call.
local function count(b, name, num) b.by[name] = (b.by[name] or 0) + num end

local function save(b)
  for name, num in pairs(b.by) do
    if num ~= 0 then redis.call('HINCRBY', b.prefix .. 'by', name, num) end
  end
  -- Not all at once: Lua has room for some thousands of values.
  for first = 1, #b.left, 1000 do
    local last = math.min(#b.left, first + 999)
    b.s.gone = b.s.gone + 1
    redis.call('XADD', b.prefix .. 'gone', 'MAXLEN', '~', GONE_KEPT, whole(b.s.gone) .. '-0', 'c',
      struct.pack('<' .. string.rep('d', last - first + 1), unpack(b.left, first, last)))
  end
  local parts = {pack_head(b.s)}
  for i, t in ipairs(b.tables) do parts[i + 1] = pack_table(t) end
  redis.call('SET', b.key, table.concat(parts))
end

local function table_key(b, kind, t) return b.prefix .. kind .. ':' .. t.index end

local function announce(b, t, field, packed)
  t.events = t.events + 1
  redis.call('XADD', table_key(b, 'events', t), 'MAXLEN', '~', EVENTS_KEPT, whole(t.events) .. '-0', field, packed)
end

local function now_s()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function read_episode(b, id)
  if b.open_id == id then return b.open end
  local packed = redis.call('HGET', b.prefix .. 'episodes', id)
  if not packed then return nil end
  local completion, last_index, seen, steps, status, success, source, intervened, digest, task_bytes, after =
    struct.unpack(EPISODE, packed)
  return {
    completion = completion, last_index = last_index, seen = seen, steps = steps, status = status, success = success,
    source = source, intervened = intervened, digest = digest,
    task = string.sub(packed, after, after + task_bytes - 1), segments = string.sub(packed, after + task_bytes)}
end

local function write_episode(b, id, e)
  redis.call('HSET', b.prefix .. 'episodes', id, struct.pack(EPISODE, e.completion, e.last_index, e.seen, e.steps,
    e.status, e.success, e.source, e.intervened, e.digest, #e.task) .. e.task .. e.segments)
end

-- The segments of an episode mostly come one after the other: it is written when another one's turn comes. Whatever
-- changes an episode otherwise must close it before it reads it.
local function keep_open(b, id, e)
  if b.open and b.open_id ~= id then write_episode(b, b.open_id, b.open) end
  b.open_id, b.open = id, e
end

local function close_episode(b)
  if b.open then write_episode(b, b.open_id, b.open) end
  b.open_id, b.open = nil, nil
end

local function num_segments(e) return e.last_index >= 0 and e.last_index + 1 or #e.segments / 16 end

local function is_seen(e, index)
  if e.last_index >= 0 and e.seen == e.last_index + 1 then return index <= e.last_index end
  if index * 16 >= #e.segments then return false end
  local sum = struct.unpack('<d', e.segments, index * 16 + 1)
  return sum == sum
end

local function set_segment(e, index, sum, version)
  if index * 16 == #e.segments then
    e.segments = e.segments .. struct.pack(SEGMENT, sum, version)
    return
  end
  local missing = index + 1 - #e.segments / 16
  if missing > 0 then e.segments = e.segments .. string.rep(struct.pack(SEGMENT, 0 / 0, 0), missing) end
  e.segments = string.sub(e.segments, 1, index * 16) .. struct.pack(SEGMENT, sum, version) ..
    string.sub(e.segments, index * 16 + 17)
end

local function row_name(b, digest, index) return b.prefix .. 'row:' .. digest .. ':' .. index end

local function payload_names(b, digest, first, last)
  local names = {}
  for index = first, last do
    names[#names + 1] = row_name(b, digest, index)
    for camera = 0, b.s.cameras_here - 1 do
      names[#names + 1] = b.prefix .. 'image:' .. digest .. ':' .. index .. ':' .. camera
    end
  end
  return names
end

local function unlink_payload(b, e)
  local last = num_segments(e) - 1
  local batch = math.max(1, math.floor(MOST_KEYS / (1 + b.s.cameras_here)))
  for first = 0, last, batch do
    redis.call('UNLINK', unpack(payload_names(b, e.digest, first, math.min(last, first + batch - 1))))
  end
end

-- Steps left that nobody took from the queue: its writers must not wait for them.
local function owe_no_more(t, steps)
  if t.queue == 1 and t.ratio >= 0 then t.balance = t.balance - steps * t.ratio end
end

-- A whole episode goes at once: without its first segment the windows of the rest would be incomplete.
local function evict(b, id, e)
  unlink_payload(b, e)
  b.removed[e.digest] = true
  if b.s.cameras_apart > 0 then
    redis.call('RPUSH', b.prefix .. 'images_gone', e.digest .. struct.pack('<I4', num_segments(e)))
  end
  if e.status == COMPLETE then
    local completion = whole(e.completion)
    redis.call('XDEL', b.prefix .. 'live', completion .. '-0')
    redis.call('HDEL', b.prefix .. 'completed', completion)
    count(b, 'task:' .. e.task, -1)
    count(b, 'source:' .. e.source, -e.steps)
    b.left[#b.left + 1] = e.completion
    b.s.complete = b.s.complete - 1
    for _, t in ipairs(b.tables) do
      local used = 0
      if t.max_draws > 0 then
        used = tonumber(redis.call('HGET', table_key(b, 'used', t), completion) or 0)
        redis.call('HDEL', table_key(b, 'used', t), completion)
      end
      t.drawable = t.drawable - e.steps + used
      owe_no_more(t, e.steps - used)
      if t.queue == 1 and used == 0 then t.lost = t.lost + 1 end
    end
  else
    b.s.broken = b.s.broken + 1
    for _, t in ipairs(b.tables) do owe_no_more(t, e.steps) end
  end
  b.s.steps = b.s.steps - e.steps
  b.s.evicted_steps = b.s.evicted_steps + e.steps
  e.status, e.steps = EVICTED, 0
  write_episode(b, id, e)
  b.changed[id] = true
  if redis.call('RPUSH', b.prefix .. 'evicted', id) > b.s.remembered then
    local forgotten = redis.call('LPOP', b.prefix .. 'evicted')
    if b.open_id == forgotten then close_episode(b) end
    redis.call('HDEL', b.prefix .. 'episodes', forgotten)
    b.changed[forgotten] = true
  end
end

-- Mostly one of the oldest. Left in the order, its name would stay for ever behind an episode that nobody finishes; and
-- forgotten and begun again, the episode would take its old turn.
local function evict_out_of_turn(b, id, e)
  evict(b, id, e)
  redis.call('LREM', b.prefix .. 'order', 1, id)
end

-- The episode that began first goes first. False where it may not: the archive does not have it yet.
local function evict_oldest(b)
  while true do
    local id = redis.call('LINDEX', b.prefix .. 'order', 0)
    if not id then error('BUG steps are stored, and no episode') end
    if b.open_id == id then close_episode(b) end
    local e = read_episode(b, id)
    if e and e.status == COMPLETE and b.s.archiving == 1 and e.completion > b.s.archived then return false end
    redis.call('LPOP', b.prefix .. 'order')
    if e and e.status ~= EVICTED then
      evict(b, id, e)
      return true
    end
  end
end

-- Values of the next n rows; the places of rows that left long ago are used again.
local function fill_ring(b, key, n, value)
  local at = b.s.row % b.s.capacity
  local here = math.min(n, b.s.capacity - at)
  redis.call('SETRANGE', key, at * 4, string.rep(value, here))
  if here < n then redis.call('SETRANGE', key, 0, string.rep(value, n - here)) end
end

-- Every segment is there: the episode may be drawn from.
local function complete(b, id, e, instruction)
  local s, n = b.s, e.last_index + 1
  s.completion, s.complete = s.completion + 1, s.complete + 1
  e.completion, e.status = s.completion, COMPLETE
  local completion = whole(e.completion)
  b.now_s = b.now_s or now_s()
  redis.call('XADD', b.prefix .. 'live', completion .. '-0', 'e',
    struct.pack(LIVE, e.completion, s.row, e.steps, n, e.source, e.success, e.intervened, 0, b.now_s, e.digest, #id,
      #e.task, #instruction) .. id .. e.task .. instruction .. e.segments)
  redis.call('HSET', b.prefix .. 'completed', completion, id)
  count(b, 'task:' .. e.task, 1)
  count(b, 'source:' .. e.source, e.steps)
  for _, t in ipairs(b.tables) do
    t.drawable = t.drawable + e.steps
    if t.prioritised == 1 then fill_ring(b, table_key(b, 'priorities', t), n, struct.pack('<f', t.max_priority)) end
    if t.max_draws > 0 and t.queue == 0 then fill_ring(b, table_key(b, 'draws', t), n, '\0\0\0\0') end
  end
  s.row = s.row + n
  e.segments = ''
end

-- Of a limiter over several shards each has its share; min_steps and buffer are those of the whole.
local function wait_reply(b, t, why)
  return {'WAIT', why, number(t.index), number(t.drawable), number(t.min_steps / b.s.shards), number(t.balance),
          number(t.ratio), number(t.buffer / b.s.shards), number(b.s.steps), number(b.s.capacity),
          number(b.s.completion - b.s.archived)}
end

local function has_least(b, t) return t.drawable >= t.min_steps / b.s.shards end

-- Every step of a queue is taken once, also those that came while it was empty.
local function counts_inserts(b, t) return t.ratio >= 0 and (t.queue == 1 or has_least(b, t)) end

local function insert_waits(b, t) return t.ratio >= 0 and has_least(b, t) and t.balance > t.buffer / b.s.shards end

-- row: nil where it is there already. False where a part of the payload is not there; then nothing is kept.
local function keep_payload(b, digest, index, row)
  -- A row that came with this commit may have left with an earlier part of its episode.
  if row == '' or (not row and b.removed[digest]) then return false end
  if b.s.cameras_here > 0 then
    local names = payload_names(b, digest, index, index)
    if redis.call('EXISTS', unpack(names, 2)) < #names - 1 then return false end
    for i = 2, #names do redis.call('PERSIST', names[i]) end
  end
  if row then redis.call('SET', row_name(b, digest, index), row) end
  return true
end

-- The rings have a place for each of the last rows, as many as the capacity. While others leave by use an episode may
-- stay for longer: it must go before its places are used again. Answers its id.
local function outstayed(b, a, e)
  local last = a.is_last == 1 and a.index or e and e.last_index or -1
  local completes = last >= 0 and (e and e.seen or 0) == last and not (e and e.status == EVICTED)
  if not (b.has_rings and completes) then return nil end
  local oldest = redis.call('XRANGE', b.prefix .. 'live', '-', '+', 'COUNT', 1)[1]
  if not oldest then return nil end
  local completion, row = struct.unpack('<dd', oldest[2][2])
  if row + b.s.capacity >= b.s.row + last + 1 then return nil end
  return redis.call('HGET', b.prefix .. 'completed', whole(completion))
end

-- One segment of a run. Answers a letter: o taken in, d a duplicate, either as a capital if its episode is evicted;
-- c contradicts its episode, with the last index of that; m its payload is missing; w must wait, with the reason.
local function take_in(b, r, a, row)
  local s, e = b.s, read_episode(b, r.id)
  if e then
    if is_seen(e, a.index) then
      s.duplicates = s.duplicates + 1
      return e.status == EVICTED and 'D' or 'd'
    end
    if (e.last_index >= 0 and a.index > e.last_index) or (a.is_last == 1 and a.index < num_segments(e) - 1) then
      -- What was staged contradicts the episode: the right segment of this name must not find it there.
      redis.call('UNLINK', unpack(payload_names(b, r.digest, a.index, a.index)))
      return 'c', e.last_index >= 0 and e.last_index or num_segments(e) - 1
    end
  end
  for i = 1, #b.tables do
    local t = b.tables[i]
    if insert_waits(b, t) then
      if b.first_try then t.inserts_waited = t.inserts_waited + 1 end
      return 'w', wait_reply(b, t, 'limiter')
    end
  end
  if s.steps > 0 and s.steps + a.length > s.capacity then
    b.changed = {}
    repeat
      if not evict_oldest(b) then return 'w', wait_reply(b, b.tables[1], 'archive') end
    until s.steps == 0 or s.steps + a.length <= s.capacity
    -- Making room may have evicted this very episode, or forgotten it.
    if b.changed[r.id] then e = read_episode(b, r.id) end
  end
  local late = b.has_rings and outstayed(b, a, e)
  while late do
    close_episode(b)
    local old = read_episode(b, late)
    if s.archiving == 1 and old.completion > s.archived then return 'w', wait_reply(b, b.tables[1], 'archive') end
    evict_out_of_turn(b, late, old)
    late = outstayed(b, a, e)
  end
  if not e then
    e = {completion = 0, last_index = -1, seen = 0, steps = 0, status = OPEN, success = 0, source = r.source,
      intervened = 0, digest = r.digest, task = r.task, segments = ''}
    if not keep_payload(b, r.digest, a.index, row) then return 'm' end
    redis.call('RPUSH', b.prefix .. 'order', r.id)
  elseif e.status == OPEN and not keep_payload(b, r.digest, a.index, row) then
    return 'm'
  end
  s.inserted = s.inserted + a.length
  for i = 1, #b.tables do
    local t = b.tables[i]
    if counts_inserts(b, t) then t.balance = t.balance + a.length * t.ratio end
  end
  e.seen = e.seen + 1
  if a.is_last == 1 then e.last_index, e.success = a.index, a.success end
  if a.intervened == 1 then e.intervened = 1 end
  set_segment(e, a.index, a.sum, a.version)
  keep_open(b, r.id, e)
  if e.status == EVICTED then
    -- It outlived the capacity while open, so it can never be drawn: accepted, and gone at once.
    s.evicted_steps = s.evicted_steps + a.length
    for i = 1, #b.tables do owe_no_more(b.tables[i], a.length) end
    return 'O'
  end
  e.steps, s.steps = e.steps + a.length, s.steps + a.length
  if e.seen == e.last_index + 1 then complete(b, r.id, e, r.instruction) end
  return 'o'
end

-- args: 1 at the first try of this append; a token, or nothing; then runs of segments: packed RUN, id, task, instruction,
-- and each segment as packed ARRIVAL. Without a token, after each run the rows of its segments, empty where the caller
-- only asks whether it must wait. With one, the rows were written under their names just before, in one transaction, by
-- a command that writes all of them and the token, or nothing where any is there.
-- Answers a letter for each segment up to the first that must wait or is missing, see take_in; for each c its last index;
-- why it must wait; and the oldest of images_gone.
local function commit(keys, args)
  local b, letters, last_indices, why = open_buffer(keys), {}, {}, {}
  b.first_try = args[1] == '1'
  local apart = args[2] ~= ''
  local fresh = apart and redis.call('GETDEL', b.prefix .. 'fresh') == args[2]
  local i, letter, unused = 3, nil, {}
  while i <= #args and (fresh or letter ~= 'w' and letter ~= 'm') do
    local packed, r, a = args[i], {}, {}
    local num, id_bytes, task_bytes, instruction_bytes, at
    r.digest, r.source, num, id_bytes, task_bytes, instruction_bytes, at = struct.unpack(RUN, packed)
    r.id = string.sub(packed, at, at + id_bytes - 1)
    at = at + id_bytes
    r.task = string.sub(packed, at, at + task_bytes - 1)
    at = at + task_bytes
    r.instruction = string.sub(packed, at, at + instruction_bytes - 1)
    at = at + instruction_bytes
    for place = i + 1, i + num do
      a.index, a.length, a.is_last, a.success, a.intervened, a.version, a.sum = struct.unpack(ARRIVAL, packed, at)
      at = at + ARRIVAL_BYTES
      if letter ~= 'w' and letter ~= 'm' then
        local row, more = nil, nil
        if not apart then row = args[place] elseif not fresh then row = '' end
        letter, more = take_in(b, r, a, row)
        letters[#letters + 1] = letter
        if letter == 'c' then last_indices[#last_indices + 1] = more end
        if letter == 'w' then why = more end
      end
      if fresh and letter ~= 'o' and letter ~= 'd' then unused[#unused + 1] = row_name(b, r.digest, a.index) end
    end
    i = i + 1 + (apart and 0 or num)
  end
  if #unused > 0 then redis.call('UNLINK', unpack(unused)) end
  close_episode(b)
  save(b)
  local images_gone = {}
  if b.s.cameras_apart > 0 then
    images_gone = redis.call('LRANGE', b.prefix .. 'images_gone', 0, MOST_IMAGES_GONE - 1)
  end
  return {table.concat(letters), last_indices, why, table.concat(images_gone)}
end

-- A client makes one charge after the other, so only its last one can come again because its answer was lost.
local function charged_key(prefix, client) return prefix .. 'charged:' .. client end

local function is_repeated(b, client, charge) return redis.call('GET', charged_key(b.prefix, client)) == charge end

local function finish_charge(b, client, charge)
  redis.call('SET', charged_key(b.prefix, client), charge, 'PX', CHARGES_KEPT_MS)
  save(b)
  return {'OK', number(now_s())}
end

-- args: index of the table, windows, 1 at the first try, client and number of its charge. Answers WAIT ..., or OK and
-- the server's time. Every batch asks for this, so only what it needs is read and written.
local function charge(keys, args)
  local packed = read_state(keys)
  local charged = charged_key(string.sub(keys[1], 1, -6), args[4])
  if redis.call('GET', charged) == args[5] then return {'OK', number(now_s())} end
  local at, num = HEAD_BYTES + tonumber(args[1]) * TABLE_BYTES, tonumber(args[2])
  local t = read_table(packed, at + 1)
  local ahead = t.ratio >= 0 and t.balance < -t.buffer
  if t.drawable < math.max(1, t.min_steps) or ahead then
    local b = open_buffer(keys)
    t = b.tables[tonumber(args[1]) + 1]
    if args[3] == '1' then
      t.samples_waited = t.samples_waited + 1
      save(b)
    end
    return wait_reply(b, t, 'limiter')
  end
  local balance = t.ratio >= 0 and t.balance - num or t.balance
  redis.call('SETRANGE', keys[1], at + BALANCE_AT, struct.pack('<dd', balance, t.sampled + num))
  redis.call('SET', charged, args[5], 'PX', CHARGES_KEPT_MS)
  return {'OK', number(now_s())}
end

-- For a table of which this is one of several shards. args: index of the table, windows drawn here, what to add to the
-- balance, 1 if a sample began to wait, client and number of its charge. Who samples compares the sums over all shards
-- and evens out the balances.
local function charge_shard(keys, args)
  local b = open_buffer(keys)
  if is_repeated(b, args[5], args[6]) then return {'OK', number(now_s())} end
  local t = b.tables[tonumber(args[1]) + 1]
  t.sampled, t.balance = t.sampled + tonumber(args[2]), t.balance + tonumber(args[3])
  t.samples_waited = t.samples_waited + tonumber(args[4])
  return finish_charge(b, args[5], args[6])
end

-- args: index of the table, packed <dd of row and priority. The row -1 only says how high a priority on another shard is.
local function reprioritise(keys, args)
  local b = open_buffer(keys)
  local t, packed = b.tables[tonumber(args[1]) + 1], args[2]
  local key, accepted = table_key(b, 'priorities', t), {}
  for at = 1, #packed, 16 do
    local row, priority = struct.unpack('<dd', packed, at)
    -- Rows that left are older than the ring and must not touch their successors.
    local stored = row >= 0 and row < b.s.row and row >= b.s.row - b.s.capacity
    if stored then redis.call('SETRANGE', key, (row % b.s.capacity) * 4, struct.pack('<f', priority)) end
    if stored or row == -1 then
      accepted[#accepted + 1] = string.sub(packed, at, at + 15)
      t.max_priority = math.max(t.max_priority, priority)
    end
  end
  if #accepted > 0 then announce(b, t, 'p', table.concat(accepted)) end
  save(b)
  return #accepted
end

-- What no table may draw from is removed, unless the archive still lacks it.
local function remove_if_used_up(b, completion, id, e)
  local name = whole(completion)
  if b.s.archiving == 1 and completion > b.s.archived then return end
  for _, other in ipairs(b.tables) do
    if other.max_draws == 0 then return end
    if tonumber(redis.call('HGET', table_key(b, 'used', other), name) or 0) < e.steps then return end
  end
  evict_out_of_turn(b, id, e)
end

-- Steps of an episode may not be drawn from this table any more.
local function use_up(b, t, completion, id, steps)
  redis.call('HINCRBY', table_key(b, 'used', t), whole(completion), steps)
  t.drawable = t.drawable - steps
  remove_if_used_up(b, completion, id, read_episode(b, id))
end

-- args: index of the table, packed <ddI4I4 of row, completion, length of the segment and a number that must be 0
-- Answers one byte for each draw: 1 where it still was within the most draws of its segment.
local function use(keys, args)
  local b = open_buffer(keys)
  local t, packed = b.tables[tonumber(args[1]) + 1], args[2]
  local key, answer, finished = table_key(b, 'draws', t), {}, {}
  for at = 1, #packed, 24 do
    local row, completion, length = struct.unpack('<ddI4', packed, at)
    local id = redis.call('HGET', b.prefix .. 'completed', whole(completion))
    local place, count = (row % b.s.capacity) * 4, t.max_draws
    if id then count = struct.unpack('<I4', redis.call('GETRANGE', key, place, place + 3)) end
    if count < t.max_draws then
      redis.call('SETRANGE', key, place, struct.pack('<I4', count + 1))
      answer[#answer + 1] = '\1'
      if count + 1 == t.max_draws then
        finished[#finished + 1] = struct.pack('<d', row)
        use_up(b, t, completion, id, length)
      end
    else
      answer[#answer + 1] = '\0'
    end
  end
  if #finished > 0 then announce(b, t, 'x', table.concat(finished)) end
  save(b)
  return table.concat(answer)
end

-- args: index of the table, consumer group, then completions that a consumer has dealt with
-- Answers how many of them nobody had acknowledged before.
local function acknowledge(keys, args)
  local b = open_buffer(keys)
  local t, fresh = b.tables[tonumber(args[1]) + 1], 0
  for i = 3, #args do
    if redis.call('XACK', b.prefix .. 'live', args[2], args[i] .. '-0') == 1 then
      fresh = fresh + 1
      local id = redis.call('HGET', b.prefix .. 'completed', args[i])
      if id then
        local e = read_episode(b, id)
        t.sampled = t.sampled + e.steps
        if t.ratio >= 0 then t.balance = t.balance - e.steps end
        use_up(b, t, tonumber(args[i]), id, e.steps)
      end
    end
  end
  save(b)
  return fresh
end

-- args: completion. Removes a damaged episode. Answers 1 when it was there.
local function discard(keys, args)
  local b = open_buffer(keys)
  local id = redis.call('HGET', b.prefix .. 'completed', args[1])
  if not id then return 0 end
  evict_out_of_turn(b, id, read_episode(b, id))
  b.s.discarded = b.s.discarded + 1
  save(b)
  return 1
end

-- args: index of a table, or -1 for the buffer itself, then names of counters, each with what to add to it. A repair
-- adds what is missing instead of setting what is right: that stays true while others write.
local function adjust(keys, args)
  local b = open_buffer(keys)
  local counters = args[1] == '-1' and b.s or b.tables[tonumber(args[1]) + 1]
  for i = 2, #args, 2 do counters[args[i]] = counters[args[i]] + tonumber(args[i + 1]) end
  save(b)
  return 'OK'
end

-- args: episode id. Answers 1 when all of it was ever taken, evicted or not.
local function has(keys, args)
  local e = read_episode(open_buffer(keys), args[1])
  return e and e.last_index >= 0 and e.seen == e.last_index + 1 and 1 or 0
end

-- args: 1 on, 0 off. While on, an episode that the archive lacks is not evicted: writers wait instead.
local function archiving(keys, args)
  local b = open_buffer(keys)
  b.s.archiving = tonumber(args[1])
  save(b)
  return 'OK'
end

-- args: the completion up to which the caller believes all is archived, and what it means to do next
-- The plan that holds from now on, an earlier one where somebody began it and did not finish; or STALE.
local function plan_archive(keys, args)
  local b = open_buffer(keys)
  if tonumber(args[1]) ~= b.s.archived then return {'STALE', number(b.s.archived)} end
  redis.call('SET', b.prefix .. 'archive_plan', args[2], 'NX')
  return {'OK', redis.call('GET', b.prefix .. 'archive_plan')}
end

-- args: the completion before the plan, the one it reaches, and the plan. Answers 1 when this call finished it.
local function finish_archive(keys, args)
  local b = open_buffer(keys)
  if tonumber(args[1]) ~= b.s.archived or redis.call('GET', b.prefix .. 'archive_plan') ~= args[3] then return 0 end
  redis.call('DEL', b.prefix .. 'archive_plan')
  b.s.archived = tonumber(args[2])
  -- What was used up before it was archived could not be removed then. Most of these numbers may have left long ago.
  local arrived = redis.call('XRANGE', b.prefix .. 'live', '(' .. args[1] .. '-0', args[2] .. '-0')
  for _, entry in ipairs(arrived) do
    local completion = string.match(entry[1], '^%d+')
    local id = redis.call('HGET', b.prefix .. 'completed', completion)
    remove_if_used_up(b, tonumber(completion), id, read_episode(b, id))
  end
  save(b)
  return 1
end

-- args: the identity that every client must agree with, the spec's JSON, packed values of HEAD and of TABLE for each
-- table, then the names of the consumer groups
-- Answers the identity that is stored.
local function create(keys, args)
  local prefix = string.sub(keys[1], 1, -6)
  if redis.call('EXISTS', keys[1]) == 0 then
    redis.call('SET', keys[1], args[3])
    redis.call('HSET', prefix .. 'config', 'identity', args[1], 'spec_json', args[2])
    for i = 4, #args do redis.call('XGROUP', 'CREATE', prefix .. 'live', args[i], '0', 'MKSTREAM') end
  end
  return redis.call('HGET', prefix .. 'config', 'identity')
end

-- args: index of the table, min_steps, ratio, buffer. The balance starts anew: the old one was counted in another
-- ratio, and could make a side wait for ever.
local function override(keys, args)
  local b = open_buffer(keys)
  local t = b.tables[tonumber(args[1]) + 1]
  t.min_steps, t.ratio, t.buffer, t.balance = tonumber(args[2]), tonumber(args[3]), tonumber(args[4]), 0
  save(b)
  return 'OK'
end

redis.register_function('vla_commit_DIGEST', commit)
redis.register_function('vla_create_DIGEST', create)
-- Whoever reads must go on when memory is full: that is what lets the limiter and the learner move.
redis.register_function{function_name = 'vla_charge_DIGEST', callback = charge, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_charge_shard_DIGEST', callback = charge_shard, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_use_DIGEST', callback = use, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_acknowledge_DIGEST', callback = acknowledge, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_reprioritise_DIGEST', callback = reprioritise, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_discard_DIGEST', callback = discard, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_adjust_DIGEST', callback = adjust, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_override_DIGEST', callback = override, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_archiving_DIGEST', callback = archiving, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_plan_archive_DIGEST', callback = plan_archive, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_finish_archive_DIGEST', callback = finish_archive, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_has_DIGEST', callback = has, flags = {'no-writes'}}
redis.register_function{
  function_name = 'vla_ping_DIGEST', callback = function() return 'PONG' end, flags = {'no-writes'}}

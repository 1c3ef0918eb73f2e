#!lua name=vla_replay_DIGEST
-- One replay table. Everything that must be atomic happens here; payloads never pass through.
--
-- KEYS[1] is always {buffer:NAME}:state, and every other key of the table starts with the same {buffer:NAME}: tag.
--   config    hash    capacity_steps, num_steps, min_steps, samples_per_insert (-1: none), error_buffer_steps,
--                     remembered_episodes, and `identity`, the JSON that every client must agree with
--   state     hash    the counters named in COUNTERS
--   row:S     string  encoded segment in slot S;   image:C:S  frames of camera number C of the same segment
--   meta      string  one RECORD per slot
--   pool      string  the slots of complete episodes, 4 bytes each, dense: a draw is uniform over it
--   free      list    slots to use again
--   episodes  hash    episode id -> EPISODE record, task, and 4 bytes for each segment index: its slot, NOT_SEEN or
--                     GONE; kept for a while after eviction, so that late retries are known
--   order     zset    episode id by order of first insertion; evicted from the front
--   evicted   list    ids of evicted episodes, oldest first
--   steps_by_source, episodes_by_task  hashes
--   stage:*   strings on their way in; they expire by themselves when their writer dies

local RECORD = '<c64I4I4i4i4I4BBBBdddd'
local RECORD_BYTES = 120
local EPISODE = '<i4I4I4BBdI4'
local OPEN, COMPLETE, EVICTED = 0, 1, 2
local NOT_SEEN, GONE = -1, -2
local COUNTERS = {'steps', 'drawable', 'pool', 'slots', 'next_order', 'inserted', 'sampled', 'duplicates',
                  'inserts_waited', 'samples_waited', 'evicted_steps', 'broken', 'complete', 'balance'}

local function number(text) return string.format('%.17g', text) end

local function open_table(keys)
  local t = {prefix = string.sub(keys[1], 1, -6), state = {}, config = {}}
  local values = redis.call('HMGET', keys[1], unpack(COUNTERS))
  for i, name in ipairs(COUNTERS) do t.state[name] = tonumber(values[i] or 0) end
  local names = {'capacity_steps', 'num_steps', 'min_steps', 'samples_per_insert', 'error_buffer_steps',
                 'remembered_episodes', 'num_cameras'}
  values = redis.call('HMGET', t.prefix .. 'config', unpack(names))
  if not values[1] then error('NOTABLE no table at ' .. t.prefix) end
  for i, name in ipairs(names) do t.config[name] = tonumber(values[i]) end
  return t
end

local function save(t)
  local pairs_ = {}
  for _, name in ipairs(COUNTERS) do
    pairs_[#pairs_ + 1] = name
    pairs_[#pairs_ + 1] = number(t.state[name])
  end
  redis.call('HSET', t.prefix .. 'state', unpack(pairs_))
end

local function now_s()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function read_record(t, slot)
  local at = slot * RECORD_BYTES
  local packed = redis.call('GETRANGE', t.prefix .. 'meta', at, at + RECORD_BYTES - 1)
  local r = {}
  r.id, r.index, r.length, r.prev, r.position, r.episode_length, r.source, r.success, r.is_last, r.unused,
    r.reward_sum, r.tail_return, r.version, r.inserted_at = struct.unpack(RECORD, packed)
  return r
end

local function write_record(t, slot, r)
  redis.call('SETRANGE', t.prefix .. 'meta', slot * RECORD_BYTES, struct.pack(RECORD, r.id, r.index, r.length, r.prev,
    r.position, r.episode_length, r.source, r.success, r.is_last, 0, r.reward_sum, r.tail_return, r.version,
    r.inserted_at))
end

local function read_episode(t, id)
  local packed = redis.call('HGET', t.prefix .. 'episodes', id)
  if not packed then return nil end
  local e = {}
  local task_bytes, after
  e.last_index, e.seen, e.steps, e.status, e.success, e.order, task_bytes, after = struct.unpack(EPISODE, packed)
  e.task = string.sub(packed, after, after + task_bytes - 1)
  e.slots = string.sub(packed, after + task_bytes)
  return e
end

local function write_episode(t, id, e)
  redis.call('HSET', t.prefix .. 'episodes', id, struct.pack(EPISODE, e.last_index, e.seen, e.steps, e.status,
    e.success, e.order, #e.task) .. e.task .. e.slots)
end

local function num_segments(e) return #e.slots / 4 end

local function slot_of(e, index)
  if index >= num_segments(e) then return NOT_SEEN end
  return (struct.unpack('<i4', e.slots, index * 4 + 1))
end

local function set_slot(e, index, slot)
  local missing = index + 1 - num_segments(e)
  if missing > 0 then e.slots = e.slots .. string.rep('\255\255\255\255', missing) end
  e.slots = string.sub(e.slots, 1, index * 4) .. struct.pack('<i4', slot) .. string.sub(e.slots, index * 4 + 5)
end

local function has_all(e) return e.last_index >= 0 and e.seen == e.last_index + 1 end

local function pool_read(t, position)
  local packed = redis.call('GETRANGE', t.prefix .. 'pool', position * 4, position * 4 + 3)
  return (struct.unpack('<I4', packed))
end

local function pool_write(t, position, slot)
  redis.call('SETRANGE', t.prefix .. 'pool', position * 4, struct.pack('<I4', slot))
end

-- The last entry moves into the gap, so the pool stays dense.
local function pool_remove(t, position)
  local last = t.state.pool - 1
  if position ~= last then
    local moved = pool_read(t, last)
    pool_write(t, position, moved)
    local r = read_record(t, moved)
    r.position = position
    write_record(t, moved, r)
  end
  t.state.pool = last
end

-- A whole episode goes at once: with its first segment gone, returns and windows of the rest would be incomplete.
local function evict(t, id)
  local p, e = t.prefix, read_episode(t, id)
  for index = 0, num_segments(e) - 1 do
    local slot = slot_of(e, index)
    if slot >= 0 then
      local r = read_record(t, slot)
      if r.position >= 0 then
        pool_remove(t, r.position)
        t.state.drawable = t.state.drawable - r.length
      end
      local names = {p .. 'row:' .. slot}
      for camera = 0, t.config.num_cameras - 1 do names[#names + 1] = p .. 'image:' .. camera .. ':' .. slot end
      redis.call('UNLINK', unpack(names))
      redis.call('RPUSH', p .. 'free', slot)
      redis.call('HINCRBY', p .. 'steps_by_source', r.source, -r.length)
      set_slot(e, index, GONE)
    end
  end
  if e.status == COMPLETE then
    redis.call('HINCRBY', p .. 'episodes_by_task', e.task, -1)
    t.state.complete = t.state.complete - 1
  else
    t.state.broken = t.state.broken + 1
  end
  t.state.steps = t.state.steps - e.steps
  t.state.evicted_steps = t.state.evicted_steps + e.steps
  e.status, e.steps = EVICTED, 0
  write_episode(t, id, e)
  redis.call('ZREM', p .. 'order', id)
  redis.call('RPUSH', p .. 'evicted', id)
  if redis.call('LLEN', p .. 'evicted') > t.config.remembered_episodes then
    redis.call('HDEL', p .. 'episodes', redis.call('LPOP', p .. 'evicted'))
  end
end

local function take_slot(t)
  local slot = redis.call('LPOP', t.prefix .. 'free')
  if slot then return tonumber(slot) end
  t.state.slots = t.state.slots + 1
  return t.state.slots - 1
end

-- Every segment is there: give each what it needs to be drawn, from the last to the first.
local function complete(t, e)
  local tail = 0
  for index = e.last_index, 0, -1 do
    local slot = slot_of(e, index)
    local r = read_record(t, slot)
    r.prev = index > 0 and slot_of(e, index - 1) or -1
    r.tail_return, r.episode_length, r.success, r.position = tail, e.steps, e.success, t.state.pool
    tail = tail + r.reward_sum
    pool_write(t, t.state.pool, slot)
    t.state.pool = t.state.pool + 1
    write_record(t, slot, r)
  end
  t.state.drawable = t.state.drawable + e.steps
  t.state.complete = t.state.complete + 1
  e.status = COMPLETE
  redis.call('HINCRBY', t.prefix .. 'episodes_by_task', e.task, 1)
end

local function wait_reply(t)
  return {'WAIT', number(t.state.drawable), number(t.config.min_steps), number(t.state.balance),
          number(t.config.samples_per_insert), number(t.config.error_buffer_steps), number(t.state.steps),
          number(t.config.capacity_steps)}
end

local function stage_names(t, stage)
  local names = {t.prefix .. 'stage:' .. stage}
  for camera = 0, t.config.num_cameras - 1 do names[#names + 1] = names[1] .. ':' .. camera end
  return names
end

-- What stops a commit: DUP, CLOSED with the last index, WAIT ..., or MISSING when the staged bytes are gone.
local function objection(t, a, e, staged)
  local s, c = t.state, t.config
  if e and slot_of(e, a.index) ~= NOT_SEEN then
    s.duplicates = s.duplicates + 1
    save(t)
    redis.call('UNLINK', unpack(staged))
    return {'DUP'}
  end
  if e and ((e.last_index >= 0 and a.index > e.last_index) or (a.is_last and a.index < num_segments(e) - 1)) then
    redis.call('UNLINK', unpack(staged))
    return {'CLOSED', e.last_index >= 0 and e.last_index or num_segments(e) - 1}
  end
  if c.samples_per_insert >= 0 and s.drawable >= c.min_steps and s.balance > c.error_buffer_steps then
    if a.first_try then
      s.inserts_waited = s.inserts_waited + 1
      save(t)
    end
    return wait_reply(t)
  end
  if redis.call('EXISTS', unpack(staged)) < #staged then return {'MISSING'} end
end

-- The staged keys become the slot's; RENAME carries their expiry along, hence PERSIST.
local function fill_slot(t, a, staged)
  local slot = take_slot(t)
  local names = {t.prefix .. 'row:' .. slot}
  for camera = 0, t.config.num_cameras - 1 do names[#names + 1] = t.prefix .. 'image:' .. camera .. ':' .. slot end
  for i, name in ipairs(names) do
    redis.call('RENAME', staged[i], name)
    redis.call('PERSIST', name)
  end
  write_record(t, slot, {
    id = a.id .. string.rep('\0', 64 - #a.id), index = a.index, length = a.length, prev = -1, position = -1,
    episode_length = 0, source = a.source, success = 0, is_last = a.is_last and 1 or 0, reward_sum = a.reward_sum,
    tail_return = 0, version = a.version, inserted_at = now_s()})
  redis.call('HINCRBY', t.prefix .. 'steps_by_source', a.source, a.length)
  return slot
end

-- args: stage, episode id, segment index, length, is_last, success, source, policy version, sum of rewards, task,
--       1 at the first try of this append
-- Answers OK, or an objection. Segments may come in any order; the episode is complete when none is missing.
local function commit(keys, args)
  local t = open_table(keys)
  local s, c = t.state, t.config
  local a = {id = args[2], index = tonumber(args[3]), length = tonumber(args[4]), is_last = args[5] == '1',
    success = tonumber(args[6]), source = tonumber(args[7]), version = tonumber(args[8]),
    reward_sum = tonumber(args[9]), task = args[10], first_try = args[11] == '1'}
  local staged = stage_names(t, args[1])
  local refusal = objection(t, a, read_episode(t, a.id), staged)
  if refusal then return refusal end

  while s.steps > 0 and s.steps + a.length > c.capacity_steps do
    evict(t, redis.call('ZRANGE', t.prefix .. 'order', 0, 0)[1])
  end
  -- Read again: making room may have evicted this very episode.
  local e = read_episode(t, a.id)
  if not e then
    e = {last_index = -1, seen = 0, steps = 0, status = OPEN, success = 0, order = s.next_order, task = a.task,
      slots = ''}
    redis.call('ZADD', t.prefix .. 'order', number(e.order), a.id)
    s.next_order = s.next_order + 1
  end
  s.inserted = s.inserted + a.length
  if c.samples_per_insert >= 0 and s.drawable >= c.min_steps then
    s.balance = s.balance + a.length * c.samples_per_insert
  end
  e.seen = e.seen + 1
  if a.is_last then e.last_index, e.success = a.index, a.success end
  if e.status == EVICTED then
    -- It outlived the table's capacity while open, so it can never be drawn: accepted, and evicted at once.
    redis.call('UNLINK', unpack(staged))
    s.evicted_steps = s.evicted_steps + a.length
    set_slot(e, a.index, GONE)
  else
    set_slot(e, a.index, fill_slot(t, a, staged))
    e.steps = e.steps + a.length
    s.steps = s.steps + a.length
    if has_all(e) then complete(t, e) end
  end
  write_episode(t, a.id, e)
  save(t)
  return {'OK'}
end

-- args: windows, context steps, seed, 1 to charge the limiter (0: in place of windows that were charged), 1 at the
--       first try
-- Answers WAIT ..., or OK, the server's time, and one packed draw per window:
--   id c64, offset I4, segment index I4, episode length I4, success B, source B, version d, inserted_at d,
--   then for each segment a window can touch, the earliest first: slot i4 (-1: not needed), tail return d
local function draw(keys, args)
  local t = open_table(keys)
  local s, c = t.state, t.config
  local num, context, charge = tonumber(args[1]), tonumber(args[2]), args[4] == '1'
  local ahead = charge and c.samples_per_insert >= 0 and s.balance < -c.error_buffer_steps
  if s.pool < 1 or s.drawable < c.min_steps or ahead then
    if args[5] == '1' then
      s.samples_waited = s.samples_waited + 1
      save(t)
    end
    return wait_reply(t)
  end
  math.randomseed(tonumber(args[3]))
  local span = 1 + math.ceil((context - 1) / c.num_steps)
  local out = {}
  for _ = 1, num do
    local slot, offset, r
    repeat
      slot = pool_read(t, math.random(s.pool) - 1)
      offset = math.random(c.num_steps) - 1
      r = read_record(t, slot)
    until offset < r.length
    local segments = {struct.pack('<i4d', slot, r.tail_return)}
    local earlier, missing = r, context - 1 - offset
    for _ = 2, span do
      local prev = earlier.prev
      if missing > 0 and prev >= 0 then
        earlier = read_record(t, prev)
        missing = missing - earlier.length
        table.insert(segments, 1, struct.pack('<i4d', prev, earlier.tail_return))
      else
        missing = 0
        table.insert(segments, 1, struct.pack('<i4d', -1, 0))
      end
    end
    out[#out + 1] = struct.pack('<c64I4I4I4BBdd', r.id, offset, r.index, r.episode_length, r.success, r.source,
      r.version, r.inserted_at) .. table.concat(segments)
  end
  if charge then
    s.sampled = s.sampled + num
    if c.samples_per_insert >= 0 then s.balance = s.balance - num end
    save(t)
  end
  return {'OK', number(now_s()), table.concat(out)}
end

-- args: order after which to look, most episodes to look at
-- Answers the order reached ('' at the end) and, for each complete episode, its id and its packed slots, first to last.
local function episodes(keys, args)
  local t = open_table(keys)
  local found = redis.call('ZRANGEBYSCORE', t.prefix .. 'order', '(' .. args[1], '+inf', 'LIMIT', 0, tonumber(args[2]))
  local reached, out = '', {}
  for _, id in ipairs(found) do
    local e = read_episode(t, id)
    reached = number(e.order)
    if e.status == COMPLETE then
      out[#out + 1] = id
      out[#out + 1] = e.slots
    end
  end
  return {reached, out}
end

-- args: episode id. Answers 1 when all of it was ever taken, evicted or not.
local function has(keys, args)
  local e = read_episode(open_table(keys), args[1])
  return e and has_all(e) and 1 or 0
end

-- args: the identity that every client must agree with, then field, value, ... of a new table
-- Answers the identity that is stored.
local function create(keys, args)
  local config = string.sub(keys[1], 1, -6) .. 'config'
  local fields = {'identity', unpack(args)}
  if redis.call('EXISTS', config) == 0 then redis.call('HSET', config, unpack(fields)) end
  return redis.call('HGET', config, 'identity')
end

-- args: min_steps, samples_per_insert, error_buffer_steps. The balance starts anew: the old one was counted in
-- another ratio, and could make a side wait for ever.
local function override(keys, args)
  local prefix = string.sub(keys[1], 1, -6)
  redis.call('HSET', prefix .. 'config', 'min_steps', args[1], 'samples_per_insert', args[2],
    'error_buffer_steps', args[3])
  redis.call('HSET', prefix .. 'state', 'balance', '0')
  return 'OK'
end

redis.register_function('vla_commit_DIGEST', commit)
-- Readers must go on when memory is full: sampling is what lets the limiter and the learner move.
redis.register_function{function_name = 'vla_draw_DIGEST', callback = draw, flags = {'allow-oom'}}
redis.register_function{function_name = 'vla_episodes_DIGEST', callback = episodes, flags = {'no-writes'}}
redis.register_function{function_name = 'vla_has_DIGEST', callback = has, flags = {'no-writes'}}
redis.register_function('vla_create_DIGEST', create)
redis.register_function{function_name = 'vla_override_DIGEST', callback = override, flags = {'allow-oom'}}
redis.register_function{
  function_name = 'vla_ping_DIGEST', callback = function() return 'PONG' end, flags = {'no-writes'}}

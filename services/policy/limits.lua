-- Books what a gateway spent, then gives it what it asks for, all or nothing; see inferflux/policy/counting.py.
-- A counter is a hash: of each entry its amount and, in Unix milliseconds, until when it counts.
--
-- KEYS: the batch of bookings, a counter per booking, a counter per ask.
-- ARGV: now, whether there is a batch to remember, the number of bookings, of asks, the divisor of shares;
--       per booking: entry, amount, until, and how: add, instead (of what the entry has), or lost (if there is no entry);
--       per ask: most, need, want, entry, until, entry of the share, until.
-- Returns 0 and per ask: used, extra, reset; or the number of the refused ask, its wait, used and reset.
local now, num_bookings, num_asks, divisor = tonumber(ARGV[1]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local BOOKING, ASK = 4, 7

local function read(text)
  local amount, till = string.match(text or '', '^(%d+) (%d+)$')
  if till and tonumber(till) > now then return tonumber(amount), tonumber(till) end
  return 0, 0
end

local function put(key, id, amount, till)
  if till <= now then return end
  redis.call('HSET', key, id, string.format('%.0f %.0f', math.max(0, amount), till))
  if redis.call('PTTL', key) < till - now then redis.call('PEXPIRE', key, string.format('%.0f', till - now)) end
end

local function add(key, id, amount, till)
  if amount ~= 0 then put(key, id, read(redis.call('HGET', key, id)) + amount, till) end
end

local function look(key)
  local live, used, newest, all = {}, 0, now, redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    local amount, till = read(all[i + 1])
    if till == 0 then
      redis.call('HDEL', key, all[i])
    elseif amount > 0 then
      live[#live + 1], used, newest = {amount, till}, used + amount, math.max(newest, till)
    end
  end
  return live, used, newest - now
end

local function wait(live, excess)
  table.sort(live, function(a, b) return a[2] < b[2] end)
  local till = now
  for _, entry in ipairs(live) do
    excess, till = excess - entry[1], entry[2]
    if excess <= 0 then break end
  end
  return till - now
end

local is_new = ARGV[2] == '0' or redis.call('SET', KEYS[1], '1', 'NX', 'EX', '900')
for i = 1, num_bookings do
  local at = 5 + (i - 1) * BOOKING
  local key, id, amount, till, how = KEYS[1 + i], ARGV[at + 1], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), ARGV[at + 4]
  if how == 'instead' or (how == 'lost' and redis.call('HEXISTS', key, id) == 0) then
    put(key, id, amount, till)
  elseif how == 'add' and is_new then
    add(key, id, amount, till)
  end
end

local first = 5 + num_bookings * BOOKING
local used = {}
for i = 1, num_asks do
  local at, key = first + (i - 1) * ASK, KEYS[1 + num_bookings + i]
  local live, sum, reset = look(key)
  local excess = sum + tonumber(ARGV[at + 2]) - tonumber(ARGV[at + 1])
  if excess > 0 then return {i, wait(live, excess), sum, reset} end
  used[i] = sum
end

local answer = {0}
for i = 1, num_asks do
  local at, key = first + (i - 1) * ASK, KEYS[1 + num_bookings + i]
  local most, need, want = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local extra = math.max(0, math.min(want - need, math.floor((most - used[i] - need) / divisor)))
  add(key, ARGV[at + 4], need, tonumber(ARGV[at + 5]))
  add(key, ARGV[at + 6], extra, tonumber(ARGV[at + 7]))
  local _, sum, reset = look(key)
  answer[#answer + 1], answer[#answer + 2], answer[#answer + 3] = sum, extra, reset
end
return answer

# The micro guest's start: command line, frequency of the TSC, place of the working set. Assembled behind micro.s.

        .text
# Words of the command line that are no parameter of ours are left alone.
read_command_line:
        movl    start_info, %ebx
        movl    INFO_COMMAND_LINE(%ebx), %esi
        testl   %esi, %esi
        jz      4f
1:      lodsb
        testb   %al, %al
        jz      4f
        cmpb    $' ', %al
        jbe     1b
        decl    %esi
        movl    $parameters, %ebx
        call    find_name
        testl   %ebx, %ebx
        jz      2f
        movl    8(%ebx), %edi
        call    *4(%ebx)
2:      lodsb
        testb   %al, %al
        jz      4f
        cmpb    $' ', %al
        ja      2b
        jmp     1b
4:      ret

# ebx = a table of entries of 12 bytes that begin with a name, esi = text. Answers in ebx the entry whose name the text
# begins with, and esi behind it; or 0.
find_name:
1:      movl    (%ebx), %edi
        testl   %edi, %edi
        jz      4f
        movl    %esi, %edx
2:      movb    (%edi), %al
        testb   %al, %al
        jz      3f
        cmpb    (%edx), %al
        jne     5f
        incl    %edi
        incl    %edx
        jmp     2b
3:      movl    %edx, %esi
        ret
5:      addl    $12, %ebx
        jmp     1b
4:      xorl    %ebx, %ebx
        ret

# edi = where the number goes; esi = its digits and perhaps k, M or G.
read_number:
        xorl    %eax, %eax
        xorl    %edx, %edx
1:      movb    (%esi), %dl
        subb    $'0', %dl
        cmpb    $9, %dl
        ja      2f
        imull   $10, %eax
        addl    %edx, %eax
        incl    %esi
        jmp     1b
2:      movb    (%esi), %dl
        xorl    %ecx, %ecx
        cmpb    $'k', %dl
        je      3f
        cmpb    $'M', %dl
        je      4f
        cmpb    $'G', %dl
        jne     5f
        addl    $10, %ecx
4:      addl    $10, %ecx
3:      addl    $10, %ecx
        shll    %cl, %eax
5:      movl    %eax, (%edi)
        ret

read_flag:
        movl    $1, (%edi)
        ret

read_pattern:
        movl    $patterns, %ebx
        call    find_name
        testl   %ebx, %ebx
        jz      unknown_pattern
        movl    4(%ebx), %eax
        movl    %eax, write_page
        jmp     *8(%ebx)

read_fill:
        movl    $patterns, %ebx
        call    find_name
        testl   %ebx, %ebx
        jz      unknown_pattern
        movl    4(%ebx), %eax
        movl    %eax, fill
        jmp     *8(%ebx)

unknown_pattern:
        movl    $text_unknown_pattern, %esi
        jmp     give_up

# The frequency of the TSC: as told, or from kvmclock's scale, or 1 GHz (QEMU's emulator counts nanoseconds).
find_tsc_khz:
        cmpl    $0, khz
        jne     2f
        movl    $1000000, khz
        movl    $KVM_LEAF, %eax
        cpuid
        cmpl    $KVM_SIGNATURE, %ebx
        jne     2f
        movl    $KVM_LEAF + 1, %eax
        cpuid
        testl   $KVM_CLOCKSOURCE2, %eax
        jz      2f
        movl    $MSR_KVM_SYSTEM_TIME_NEW, %ecx
        movl    $kvm_clock + 1, %eax
        xorl    %edx, %edx
        wrmsr
        # kHz = 10^6 * 2^32 / tsc_to_system_mul * 2^-tsc_shift
        movl    kvm_clock + 24, %ebx
        movb    kvm_clock + 28, %cl
        testl   %ebx, %ebx
        jz      3f
        movl    $1000000, %edx
        xorl    %eax, %eax
        divl    %ebx
        testb   %cl, %cl
        js      1f
        shrl    %cl, %eax
        jmp     4f
1:      negb    %cl
        shll    %cl, %eax
4:      movl    %eax, khz
3:      movl    $MSR_KVM_SYSTEM_TIME_NEW, %ecx
        xorl    %eax, %eax
        xorl    %edx, %edx
        wrmsr
2:      ret

# The working set goes to 16 MiB, or behind a module that lies there, and must be RAM. With `over` it is the beginning of
# the first module.
place_working_set:
        movl    ws, %eax
        shrl    $12, %eax
        movl    %eax, pages
        cmpl    $0, over
        jne     place_over_module
        movl    $LOWEST_WORKING_SET, base
        movl    start_info, %ebx
        movl    INFO_MODULES(%ebx), %ecx
        movl    INFO_MODULE_LIST(%ebx), %esi
1:      testl   %ecx, %ecx
        jz      3f
        movl    (%esi), %eax
        movl    %eax, %edx
        addl    MODULE_SIZE(%esi), %edx         # module: eax..edx
        movl    pages, %edi
        shll    $12, %edi
        addl    base, %edi                      # working set: base..edi
        jc      no_room
        cmpl    %edi, %eax
        jae     2f
        cmpl    %edx, base
        jae     2f
        addl    $PAGE - 1, %edx
        andl    $-PAGE, %edx
        movl    %edx, base
        # It may now overlap with a module that was looked at before.
        movl    INFO_MODULES(%ebx), %ecx
        movl    INFO_MODULE_LIST(%ebx), %esi
        jmp     1b
2:      addl    $MODULE_ENTRY, %esi
        decl    %ecx
        jmp     1b
3:      movl    base, %edi
        movl    %edi, page_address
        cmpl    $0, pages
        je      7f
        movl    pages, %edx
        shll    $12, %edx
        addl    %edx, %edi
        jc      no_room
        movl    INFO_MEMORY_ENTRIES(%ebx), %ecx
        movl    INFO_MEMORY_MAP(%ebx), %esi
4:      testl   %ecx, %ecx
        jz      no_room
        cmpl    $MEMORY_RAM, MEMORY_TYPE(%esi)
        jne     6f
        cmpl    $0, 4(%esi)                     # begins above 4 GiB
        jne     6f
        movl    (%esi), %eax
        cmpl    %eax, base
        jb      6f
        movl    MEMORY_SIZE(%esi), %edx
        addl    %eax, %edx
        movl    MEMORY_SIZE + 4(%esi), %eax
        adcl    $0, %eax
        jnz     7f                              # ends above 4 GiB
        cmpl    %edx, %edi
        jbe     7f
6:      addl    $MEMORY_ENTRY, %esi
        decl    %ecx
        jmp     4b
7:      ret

place_over_module:
        cmpl    $0, content
        jne     content_would_change
        movl    start_info, %ebx
        cmpl    $0, INFO_MODULES(%ebx)
        je      no_module
        movl    INFO_MODULE_LIST(%ebx), %esi
        movl    (%esi), %eax
        movl    %eax, %edx
        addl    MODULE_SIZE(%esi), %edx
        addl    $PAGE - 1, %eax
        andl    $-PAGE, %eax
        movl    %eax, base
        movl    %eax, page_address
        subl    %eax, %edx
        jc      no_module
        shrl    $12, %edx
        cmpl    %edx, pages
        ja      no_module
        ret

content_would_change:
        movl    $text_content_would_change, %esi
        jmp     give_up
no_module:
        movl    $text_no_module, %esi
        jmp     give_up
no_room:
        movl    $text_no_room, %esi
give_up:
        call    print
        movw    $PM1A_CONTROL, %dx
        movw    $POWER_OFF, %ax
        outw    %ax, %dx
        jmp     halt

# Turns times into cycles.
plan:
        movl    tick, %eax
        testl   %eax, %eax
        jnz     1f
        movl    $100, %eax
1:      mull    khz
        movl    %eax, beat_cycles
        movl    %edx, beat_cycles + 4
        movl    rate, %ecx
        testl   %ecx, %ecx
        jz      3f
        movl    slice_pages, %eax
        imull   $1000, %eax
        mull    khz
        call    divide
        testl   %ebx, %ebx
        jz      2f
        orl     $-1, %eax                       # slower than a slice in 2^32 cycles is as slow as that
2:      movl    %eax, slice_cycles
3:      ret

start_clock:
        rdtsc
        movl    %eax, started
        movl    %edx, started + 4
        movl    %eax, now
        movl    %edx, now + 4
        movl    %eax, next_beat
        movl    %edx, next_beat + 4
        movl    %eax, due
        movl    %edx, due + 4
        ret
